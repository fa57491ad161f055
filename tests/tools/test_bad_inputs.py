"""Bad input of any command gives one message that quotes it, and has no other effect.

Over a thousand whole commands run, each in a process with limits of processor time and memory.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.bad_inputs import inputs, judging
from tests.bad_inputs.case import Case
from tests.bad_inputs.cases import every_case
from tests.bad_inputs.forks import WALL_S, Ended, Job, run_all

CASES = every_case()
DAILY = [case for case in CASES if not case.nightly]
NIGHTLY = [case for case in CASES if case.nightly]
LEAST = 1100

Tried = tuple[list[Ended], set[str]]


def counts(cases: list[Case]) -> dict[str, int]:
    of_command = Counter(case.command for case in cases)
    names = {command: command.replace("-", "_").replace(" ", "_") for command in of_command}
    return {f"bad_inputs_of_{names[command]}": count for command, count in of_command.items()}


def try_all(folder: Path, cases: list[Case]) -> Tried:
    judging.make(folder)
    before = set(judging.content(folder))
    ended = judging.tried(folder, cases)
    return ended, {name for name, _ in before ^ set(judging.content(folder))}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return try_all(tmp_path_factory.mktemp("inputs"), DAILY)


def check(cases: list[Case], ended: list[Ended]) -> None:
    failures = [*judging.failures(cases, ended)]
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures)


@pytest.mark.counts(**counts(DAILY))
def test_every_bad_input_gets_one_message_that_quotes_it(tried: Tried) -> None:
    ended, _ = tried
    check(DAILY, ended)


def test_no_bad_input_changes_a_file(tried: Tried) -> None:
    _, changed = tried
    assert changed == set()


@pytest.mark.nightly
@pytest.mark.counts(**counts(NIGHTLY))
def test_the_rest_of_the_bad_inputs_is_refused_alike(tmp_path: Path) -> None:
    ended, changed = try_all(tmp_path, NIGHTLY)
    check(NIGHTLY, ended)
    assert changed == set()


def test_there_are_over_a_thousand_different_bad_inputs() -> None:
    assert len({case.key for case in CASES}) == len(CASES)
    assert len(DAILY) >= LEAST


GUARDED = f"stopped by the guard of {WALL_S} s"
WRONG = {
    "print(end='')": "status 0",
    "raise ValueError('x')": "a traceback",
    "import sys; sys.exit('one\\ntwo')": "messages: 2",
    "import sys; sys.exit('another')": "does not say 'quoted'",
    "import sys; sys.exit('\\x1b[2J')": "control characters",
    "print('\\u202e')": "control characters",
    "while True: pass": "stopped by 1 s of processor time",
    "x = bytearray(b'x' * 3 * 2**30)": "stopped by 2,147,483,648 bytes resident",
}


def test_the_harness_finds_what_goes_wrong(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{number}.py" for number in range(len(WRONG))]
    for script, code in zip(scripts, WRONG, strict=True):
        script.write_text(code)
    cases = [Case((str(script),), "quoted") for script in scripts]
    seconds = [1 if "while" in code else 10 for code in WRONG]
    jobs = [Job(case.words, str(tmp_path), {}, s) for case, s in zip(cases, seconds, strict=True)]
    for case, end, problem in zip(cases, run_all(jobs), WRONG.values(), strict=True):
        found = list(judging.problems(case, end))
        # On a busy machine, a child may not reach its limit within the guard.
        assert problem in found or (problem.startswith("stopped") and GUARDED in found)


def test_the_harness_finds_what_was_changed(tmp_path: Path) -> None:
    inputs.make(tmp_path)
    before = set(judging.content(tmp_path))
    assert before == set(judging.content(tmp_path))
    kept = tmp_path / "kept.json"
    stat = kept.stat()
    kept.write_text("[]")
    os.utime(kept, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "out" / "new").touch()
    changed = before ^ set(judging.content(tmp_path))
    assert {name for name, _ in changed} == {"kept.json", "out/new"}
