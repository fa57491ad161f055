"""A folder's other users gain nothing by temporary files, and no one's leftover is in the way."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.files import writing
from megatron_laer.telemetry.trace_file import TRACE
from tests.traces import some_counts, write_recording

KEY = "0123456789abcdef"
FORMER = ".log.megatron_laer.tmp"
CURRENT = f".log.{KEY}.megatron_laer.tmp"
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("name", [FORMER, CURRENT])
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic link", "hard link"])
def test_a_planted_link_leads_to_no_other_file(
    folder: Path, victim: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    link(victim, folder / name)
    writing.write_file(folder / "log", "new")
    assert victim.read_text() == "mine" and victim.stat().st_nlink <= 2
    assert (folder / "log").read_text() == "new" and not (folder / "log").is_symlink()


@pytest.mark.parametrize("planted", [os.symlink, os.link, None], ids=["symbolic", "hard", "file"])
def test_a_name_that_others_have_guessed_is_not_opened(
    folder: Path,
    victim: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: Callable[[Path, Path], None] | None,
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: KEY)
    if planted is None:
        (folder / CURRENT).write_text("theirs")
    else:
        planted(victim, folder / CURRENT)
    with pytest.raises(FileExistsError):
        writing.write_file(folder / "log", "new")
    assert victim.read_text() == "mine" and os.listdir(folder) == [CURRENT]


def test_names_of_temporary_files_are_not_repeated(folder: Path) -> None:
    names = set()
    for _ in range(20):
        new = writing.Replacement(folder / "log")
        names.update(os.listdir(folder))
        new.discard()
    assert len(names) == 20


@pytest.mark.parametrize("name", [FORMER, CURRENT])
def test_who_holds_a_file_of_such_a_name_open_writes_no_result(folder: Path, name: str) -> None:
    with (folder / name).open("w") as held:
        (folder / name).chmod(0o666)
        writing.write_file(folder / "log", "new")
        held.write("EVIL")
        held.flush()
    assert (folder / "log").read_text() == "new"
    assert stat.S_IMODE((folder / "log").stat().st_mode) & 0o022 == 0


def test_a_link_that_takes_a_temporary_files_name_is_not_followed(
    folder: Path, victim: Path
) -> None:
    """Write as Megatron does, which opens a dataset's new files once more."""
    new = writing.Replacement(folder / "log")
    (temporary,) = folder.iterdir()
    temporary.unlink()
    temporary.symlink_to(victim)
    new.path.write_text("new")
    new.file.seek(0)
    assert new.file.read() == b"new" and victim.read_text() == "mine"
    new.discard()


def _folder(path: Path) -> None:
    (path / "full").mkdir(parents=True)


def _unreadable(path: Path) -> None:
    path.touch(mode=0)


def _of_another(path: Path) -> None:
    path.write_text("half")
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize("name", [FORMER, CURRENT])
@pytest.mark.parametrize(
    "leave",
    [
        _folder,
        os.mkfifo,
        pytest.param(
            _unreadable, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads all files")
        ),
        pytest.param(
            _of_another, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files")
        ),
    ],
)
def test_leftovers_of_others_are_left_and_not_in_the_way(
    folder: Path, name: str, leave: Callable[[Path], None]
) -> None:
    leave(folder / name)
    for content in ("new", "newer"):
        writing.write_file(folder / "log", content)
        assert (folder / "log").read_text() == content
    assert sorted(os.listdir(folder)) == [name, "log"]


def test_only_leftovers_of_the_same_target_are_removed(folder: Path) -> None:
    others = {
        FORMER,
        CURRENT.upper(),
        f".log.x.{KEY}.megatron_laer.tmp",
        f".xlog.{KEY}.megatron_laer.tmp",
        f".log.{KEY}0.megatron_laer.tmp",
        f".log.{KEY}.megatron_laer_tmp",
    }
    for name in (*others, CURRENT):
        (folder / name).touch()
    writing.write_file(folder / "log", "new")
    assert {*os.listdir(folder)} == {*others, "log"}
    odd = folder / "[a-z].*(\n"
    (folder / f".{odd.name}.{KEY}.megatron_laer.tmp").touch()
    writing.write_file(odd, "new")
    assert {*os.listdir(folder)} == {*others, "log", odd.name}


def test_a_leftover_that_is_locked_is_a_living_writers(folder: Path) -> None:
    with (folder / CURRENT).open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(writing.InUseError):
            writing.write_file(folder / "log", "new")
        assert os.listdir(folder) == [CURRENT]
    writing.write_file(folder / "log", "new")
    assert os.listdir(folder) == ["log"]


def test_of_two_writers_the_second_is_refused_and_spoils_nothing(folder: Path) -> None:
    first = writing.Replacement(folder / "log")
    for _ in range(2):
        with pytest.raises(writing.InUseError):
            writing.Replacement(folder / "log")
    other = writing.Replacement(folder / "log2")
    other.discard()
    first.file.write(b"first")
    first.commit()
    first.file.close()
    assert (folder / "log").read_text() == "first" and os.listdir(folder) == ["log"]


@pytest.mark.parametrize("step", range(4), ids=["create", "lock", "look", "list"])
def test_of_two_writers_that_begin_at_once_one_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Begin the second one before a step of the first one."""
    begun: list[writing.Replacement] = []
    refused, left = [], step

    def begin(name: str) -> None:
        try:
            begun.append(writing.Replacement(folder / "log"))
        except writing.InUseError:
            refused.append(name)

    def interrupted[**P, R](function: Callable[P, R]) -> Callable[P, R]:
        def meanwhile(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal left
            left -= 1
            if left == -1:
                begin("second")
            return function(*args, **kwargs)

        return meanwhile

    with monkeypatch.context() as patched:
        for module, name in ((os, "open"), (fcntl, "flock"), (os, "lstat"), (os, "listdir")):
            patched.setattr(module, name, interrupted(getattr(module, name)))
        begin("first")
    # Who is locked is safe; before that, the other one takes its file for a leftover.
    assert refused == ["first" if step < 2 else "second"]
    assert len(begun) == len(os.listdir(folder)) == 1
    begun[0].discard()
    assert not os.listdir(folder)


def test_without_locks_a_living_writers_file_is_not_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        first = writing.Replacement(folder / "log")
        writing.write_file(folder / "log", "second")
    assert "its file system has no locks" in caplog.text
    first.file.write(b"first")
    first.commit()
    first.file.close()
    assert (folder / "log").read_text() == "first" and os.listdir(folder) == ["log"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o400, 0o755])
def test_a_target_keeps_its_mode_and_its_content_is_at_no_time_readable_by_more(
    folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "log").touch()
    (folder / "log").chmod(mode)
    created = []
    fchmod = os.fchmod

    def note(descriptor: int, to: int) -> None:
        created.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fchmod(descriptor, to)

    monkeypatch.setattr(os, "fchmod", note)
    writing.write_file(folder / "log", "new")
    assert created == [0o600]
    assert stat.S_IMODE((folder / "log").stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_the_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        writing.write_file(folder / "log", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "log").stat().st_mode) == 0o640


def test_a_link_at_the_target_itself_stays(folder: Path, victim: Path) -> None:
    (folder / "log").symlink_to(victim)
    writing.write_file(folder / "log", "new")
    assert (folder / "log").is_symlink() and victim.read_text() == "new"
    assert not [name for name in os.listdir(victim.parent) if name.endswith(".tmp")]


def test_a_file_that_is_kept_open_is_never_opened_through_a_link(
    folder: Path, victim: Path
) -> None:
    absent = folder / "absent"
    for there in (victim, absent):
        (folder / "log").symlink_to(there)
        with pytest.raises(OSError, match="symbolic links"):
            writing.open_exclusively(folder / "log")
        (folder / "log").unlink()
    assert victim.read_text() == "mine" and not absent.exists()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic link", "hard link"])
def test_a_run_that_repeats_steps_writes_no_other_file(
    folder: Path, victim: Path, link: Callable[[Path, Path], None]
) -> None:
    path, counts = TRACE.path(folder, 0), some_counts(4)
    write_recording(path, counts)
    aside = path.with_stem(f"{path.stem}.cut-from-2")
    for name in (path.name, aside.name):
        link(victim, folder / f".{name}.megatron_laer.tmp")
        link(victim, folder / f".{name}.{KEY}.megatron_laer.tmp")
    write_recording(path, counts[2:], first_step=2)
    assert victim.read_text() == "mine" and not path.is_symlink() and not aside.is_symlink()
    (folder / "other").mkdir()
    at_once = TRACE.path(folder / "other", 0)
    write_recording(at_once, counts)
    assert path.read_bytes() == at_once.read_bytes()
