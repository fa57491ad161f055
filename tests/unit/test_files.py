"""Files and YAML of other programs are read within limits, and files are written whole."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, BinaryIO
from unittest import mock

import pytest
import yaml

from megatron_laer.files import checks, writing, yaml_text
from megatron_laer.files.yaml_text import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

# Its child outlives it, and has no lock.
_WRITER = """
import os, sys
from pathlib import Path
from megatron_laer.files.writing import Replacement
replacement = Replacement(Path(sys.argv[1]))
replacement.file.write(b"half")
child = os.fork()
if child == 0:
    replacement.file.write(b"lost")
    print("child\\n", end="", flush=True)  # at once, also where output is not buffered
    os.read(0, 1)
    os._exit(0)
print("parent\\n", end="", flush=True)
os.waitpid(child, 0)
"""


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # not waited for
    for path, kind in (("/dev/zero", "a device"), ("/", "a folder"), (tmp_path / "pipe", "a pipe")):
        with pytest.raises(ValueError, match=f"is {kind}; give a regular file"):
            checks.read_text(Path(path))


def test_a_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf12345678")
    assert checks.read_text(path, max_bytes=11) == "12345678"
    with pytest.raises(ValueError, match=r"has 11 bytes; at most 10 are expected"):
        checks.read_text(path, max_bytes=10)
    with pytest.raises(ValueError, match=r"has 91 bytes; at most 90 are expected"):
        checks.read_text(Path("/proc/self/status"), max_bytes=90)  # its size is said to be 0
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"text' is not UTF-8 text"):
        checks.read_text(path)


def test_quotes_are_one_short_line_without_control_characters() -> None:
    shown = checks.quoted("a\x1b[31m\nb" + "x" * 5000)
    assert shown.isprintable() and len(shown) < 300
    assert checks.quoted("plain") == "'plain'"


def test_a_shell_takes_its_words_again_and_a_terminal_sees_no_control_character() -> None:
    words = ["a b", "", "\x1b[2J\n'FAKE' \u202e", "caf\udce9 \u00e9", "$(x)", "\u6f22"]
    printed = checks.shell_words(words)
    assert printed.isprintable()
    taken = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {printed}"], capture_output=True, check=True
    ).stdout
    assert [os.fsdecode(word) for word in taken.split(b"\0")[:-1]] == words


def test_outputs_that_cannot_be_written_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before, long = sorted(tmp_path.iterdir()), tmp_path / ("x" * 300)
    absent = tmp_path / "none" / "x", tmp_path / "file" / "x"
    for output in ("", tmp_path, *absent, "/dev/full", long):
        with pytest.raises(ValueError, match="--json"):
            checks.refuse_unwritable(output, "--json")
    for folder in ("", tmp_path / "file", tmp_path / "file" / "x", "/proc/x", long):
        with pytest.raises(ValueError, match="--fsep-record"):
            checks.refuse_unusable_folder(folder, "--fsep-record")
    checks.refuse_unwritable(tmp_path / "file", "--json")
    checks.refuse_unusable_folder(tmp_path / "a" / "b", "--fsep-record")
    assert sorted(tmp_path.iterdir()) == before


def test_a_replacement_stays_locked_in_its_targets_place(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old")
    replacement = writing.Replacement(log)
    replacement.file.write(b"new")
    replacement.commit()
    assert log.read_bytes() == b"new" and os.listdir(tmp_path) == ["log"]
    with pytest.raises(writing.InUseError):
        writing.open_exclusively(log)
    replacement.file.close()


@pytest.mark.parametrize("holds", [False, True], ids=["has removed it", "is about to"])
def test_a_replacement_that_another_writer_removes_meanwhile_is_begun_anew_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    """Run another process's `discard` between opening and locking."""
    target, lock, met = tmp_path / "log", writing.lock, []

    def lock_late(file: IO[bytes], path: Path, how: int = fcntl.LOCK_EX) -> bool:
        if not met:
            met.append(path)
            with path.open("r+b") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                if holds:
                    lock(file, path)
                path.unlink()
        return lock(file, path, how)

    monkeypatch.setattr(writing, "lock", lock_late)
    if holds:
        with pytest.raises(writing.InUseError):
            writing.write_file(target, "new")
    writing.write_file(target, "new")
    assert met and target.read_text() == "new"


def test_content_is_on_disk_before_its_name_and_the_name_before_the_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power loss may leave an empty file under the name of a complete one."""
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes")
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append(f"name {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    writing.write_file(tmp_path / "log", "12345")
    assert done == ["5 bytes", "name log", "folder"]


def test_a_file_keeps_its_mode_when_it_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "log", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    writing.write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_failed_replacement_leaves_the_target_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: BinaryIO, content: bytes) -> None:
        file.write(content[:2])
        raise RuntimeError

    target = tmp_path / "log"
    target.write_text("old")
    monkeypatch.setattr(writing, "write_all", fail)
    with pytest.raises(RuntimeError):
        writing.write_file(target, "new")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["log"]


def test_a_target_has_one_writer_and_the_next_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    target, other = tmp_path / "log", tmp_path / ".log.tmp"
    other.touch()
    command = [sys.executable, "-c", _WRITER, str(target)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdin is not None and writer.stdout is not None
    with writer:
        said = sorted(writer.stdout.readline().strip() for _ in range(2))
        assert said == ["child", "parent"]
        with pytest.raises(writing.InUseError):
            writing.write_file(target, "new")
        (left,) = {*tmp_path.iterdir()} - {other}
        assert left.read_bytes() == b"half"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert left.exists() and not target.exists()
        writing.write_file(target, "new")
        writer.stdin.close()
    assert target.read_text() == "new" and sorted(os.listdir(tmp_path)) == [other.name, "log"]
    first = writing.Replacement(target)
    first.commit()
    left.touch()  # of another writer, which has begun since
    first.discard()
    assert left.exists()


ROOT = Path(__file__).resolve().parents[2]

DEEPEST: list[Any] = []
for _ in range(MAX_DEPTH - 1):
    DEEPEST = [DEEPEST]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("# only a comment", None),
        ("---", ""),
        ("text", "text"),
        ("{a: 1, b: no, c: 1e3, d: '2'}", {"a": "1", "b": "no", "c": "1e3", "d": "2"}),
        ("{e: ~, f: 2001-01-01, <<: x}", {"e": "~", "f": "2001-01-01", "<<": "x"}),
        ("- [1, [2, {a: }]]", [["1", ["2", {"a": ""}]]]),
        ("[[" * (MAX_DEPTH // 2 - 1) + "[[]]" + "]]" * (MAX_DEPTH // 2 - 1), DEEPEST),
        ("a:\n  b: |\n    two\n    lines\n", {"a": {"b": "two\nlines\n"}}),
    ],
)
def test_values_are_the_texts_that_are_written(text: str, content: object) -> None:
    assert parse_yaml(text) == content


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_both_parsers_read_our_files_alike(path: Path) -> None:
    found = read_yaml(path)
    with mock.patch.object(yaml_text, "_FASTEST", yaml.BaseLoader):
        assert read_yaml(path) == found and isinstance(found, dict)


def test_a_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("[")
    with pytest.raises(ValueError, match=rf"^{path}: line 1: not valid YAML"):
        read_yaml(path)
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"x\.yaml' has 65,537 bytes; at most 65,536"):
        read_yaml(path)
