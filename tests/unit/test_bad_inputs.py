"""Whatever is passed to a command that cannot work: one message that quotes it, and nothing else.

Hundreds of whole commands, each in a process of its own with limits of processor time and memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_inputs import inputs, programs, report
from tests.bad_inputs.cases import Case, all_cases
from tests.bad_inputs.forks import WALL_S, Ended, Job, run_all
from tests.parity.flags import command_line

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pretrain_gpt.py"
TRAINING = command_line("absent", experts=8, expert_parallel=2, global_batch=4, steps=1)
CASES = tuple(all_cases(str(SCRIPT), tuple(TRAINING)))
LEAST = 400


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Ended], set[str]]:
    """How each case ended, and which entries of the folder of the inputs have changed."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs.make(folder)
    report.make(folder)
    programs.make(folder)
    before = set(_content(folder))
    jobs = [Job(case.words, str(folder), case.environment) for case in CASES]
    ended = list(run_all(jobs))
    return ended, {name for name, _ in before ^ set(_content(folder))}


def _content(folder: Path) -> Iterator[tuple[str, str]]:
    """Every entry of a folder, with what tells whether it was changed."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            found = path.lstat()
            told = f"{found.st_mode} {found.st_size} {found.st_ino}"
            if stat.S_ISREG(found.st_mode):
                told += f" {found.st_mtime_ns}"
                if found.st_size < inputs.HUGE:
                    told += hashlib.blake2b(path.read_bytes()).hexdigest()
            yield str(path.relative_to(folder)), told


def _problems(case: Case, ended: Ended) -> Iterator[str]:
    if ended.limit:
        yield f"stopped by {ended.limit}"
    if ended.status != 2:
        yield f"status {ended.status}"
    if "Traceback" in ended.errors:
        yield "a traceback"
    messages = _messages(ended.errors)
    if len(messages) != 1:
        yield f"{len(messages)} messages"
    if case.says not in ended.errors:
        yield f"does not say {case.says!r}"
    if not ended.errors.replace("\n", "").isprintable():
        yield "control characters"
    if case.command != "train":
        if ended.output:
            yield f"prints {ended.output[:200]!r}"
        if len(ended.errors) > 2500:
            yield f"{len(ended.errors)} characters"


def _messages(errors: str) -> list[str]:
    """Lines on stderr, without argparse's usage and the further lines of a message."""
    lines = errors.splitlines()
    return [line for line in lines if not line.startswith((" ", "usage:"))]


COUNTS = Counter(f"bad_inputs_of_{case.command.replace('-', '_')}" for case in CASES)


@pytest.mark.counts(**COUNTS)
def test_every_bad_input_gets_one_message_that_quotes_it(
    tried: tuple[list[Ended], set[str]],
) -> None:
    ended, _ = tried
    assert len(ended) == len(CASES)
    failures = [
        f"{' '.join(case.words)[-300:]!r} {case.environment}: {'; '.join(problems)}\n"
        f"    {end.errors[-600:]}"
        for case, end in zip(CASES, ended, strict=True)
        if (problems := list(_problems(case, end)))
    ]
    assert not failures, f"{len(failures)} of {len(CASES)}:\n" + "\n".join(failures)


def test_no_bad_input_changes_a_file(tried: tuple[list[Ended], set[str]]) -> None:
    _, changed = tried
    assert changed == set()


def test_there_are_hundreds_of_different_bad_inputs() -> None:
    different = {(case.words, tuple(sorted(case.environment.items()))) for case in CASES}
    assert len(different) == len(CASES) >= LEAST


GUARDED = f"stopped by the guard of {WALL_S} s"
# Scripts that `train` runs, and the problem that is found with each.
WRONG = {
    "print(end='')": "status 0",
    "raise ValueError('x')": "a traceback",
    "import sys; sys.exit('one\\ntwo')": "2 messages",
    "import sys; sys.exit('another')": "does not say 'quoted'",
    "while True: pass": "stopped by 10 s of processor time",
    "x = bytearray(b'x' * 3 * 2**30)": "stopped by 2,147,483,648 bytes resident",
}


def test_the_harness_finds_what_goes_wrong(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{number}.py" for number in range(len(WRONG))]
    for script, code in zip(scripts, WRONG, strict=True):
        script.write_text(code)
    cases = [Case(("train", str(script)), "quoted") for script in scripts]
    ended = run_all(Job(case.words, str(tmp_path), {}) for case in cases)
    for case, end, problem in zip(cases, ended, WRONG.values(), strict=True):
        found = list(_problems(case, end))
        # Where others keep the machine busy, a child may not come to its limit within the guard.
        assert problem in found or (problem.startswith("stopped") and GUARDED in found)


def test_the_harness_finds_what_was_changed(tmp_path: Path) -> None:
    inputs.make(tmp_path)
    before = set(_content(tmp_path))
    assert before == set(_content(tmp_path))
    kept = tmp_path / "kept.json"
    stat = kept.stat()
    kept.write_text("[]")
    os.utime(kept, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "out" / "new").touch()
    assert {name for name, _ in before ^ set(_content(tmp_path))} == {"kept.json", "out/new"}
