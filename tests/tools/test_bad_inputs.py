"""Bad input of any command gives one message that quotes it, and has no other effect.

Hundreds of whole commands run, each in a process with limits of processor time and memory. Values
that an option's type excludes are parsed here, all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from megatron_laer.files.checks import one_line
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from tests.bad_inputs import inputs, values
from tests.bad_inputs.case import Case, failures, problems
from tests.bad_inputs.cases import content, every_case, make
from tests.bad_inputs.forks import WALL_S, Ended, Job, run_all

CASES = every_case()
DAILY = [case for case in CASES if not case.nightly]
NIGHTLY = [case for case in CASES if case.nightly]
# Those that one study tried, and the drawn ones.
LEAST = {"training": 309 + 160, "recordings": 184 + 70, "commands": 405 + 70}
LEAST_DAILY = 400

Tried = tuple[list[Ended], set[str]]


def try_all(folder: Path, cases: list[Case]) -> Tried:
    make(folder)
    before = set(content(folder))
    ended = [*run_all(Job(case.words, str(folder), case.environment) for case in cases)]
    return ended, {name for name, _ in before ^ set(content(folder))}


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return try_all(tmp_path_factory.mktemp("inputs"), DAILY)


def check(cases: list[Case], ended: list[Ended]) -> None:
    found = [*failures(cases, ended)]
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)


def test_every_bad_input_gets_one_message_that_quotes_it(daily: Tried) -> None:
    ended, _ = daily
    check(DAILY, ended)


def test_no_bad_input_changes_a_file(daily: Tried) -> None:
    _, changed = daily
    assert changed == set()


@pytest.mark.nightly
def test_the_rest_of_the_bad_inputs_is_refused_alike(tmp_path: Path) -> None:
    ended, changed = try_all(tmp_path, NIGHTLY)
    check(NIGHTLY, ended)
    assert changed == set()


def test_bad_inputs_are_many_and_different() -> None:
    assert len({case.key for case in CASES}) == len(CASES)
    assert len(DAILY) >= LEAST_DAILY
    found = Counter(case.kind for case in CASES)
    assert {kind: number for kind, number in found.items() if number < LEAST[kind]} == {}


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_an_option_refuses_every_value_that_its_type_excludes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, parser = cli._parsers(command)
    for action in parser._actions:
        for text in values.excluded(action):
            flag = action.option_strings[-1] if action.option_strings else ""
            with pytest.raises(SystemExit) as stopped:
                parser.parse_known_args([f"{flag}={text}" if flag else text])
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.count("\n") == 1, (flag, text, error)
            assert error[:-1].isprintable() and len(error) < 2500
            assert f"argument {flag or action.metavar}: " in error
            assert one_line(text)[: values.SHOWN] in error


@pytest.mark.parametrize("field", inputs.MODEL)
def test_a_size_of_a_model_that_is_no_number_is_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    for text in inputs.NO_SIZES:
        inputs.write_model(path, inputs.MODEL | {field: text})
        with pytest.raises(ValueError) as refused:
            read_model(str(path))
        said = one_line(refused.value)
        assert str(path) in said or f"has no {field} in " in said, text


GUARDED = f"stopped by the guard of {WALL_S} s"
WRONG = {
    "print(end='')": "status 0",
    "raise ValueError('x')": "a traceback",
    "import sys; sys.exit('one\\ntwo')": "messages: 2",
    "import sys; sys.exit('another')": "does not say 'quoted'",
    "import sys; sys.exit('\\x1b[2J')": "control characters",
    "print('\\u202e')": "control characters",
    "while True: pass": "stopped by its limit of processor time",
    "x = bytearray(b'x' * 3 * 2**30)": "a traceback",
}


def test_the_harness_finds_what_goes_wrong(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{number}.py" for number in range(len(WRONG))]
    for script, code in zip(scripts, WRONG, strict=True):
        script.write_text(code)
    cases = [Case((str(script),), "quoted") for script in scripts]
    seconds = [1 if "while" in code else 10 for code in WRONG]
    jobs = [Job(case.words, str(tmp_path), {}, s) for case, s in zip(cases, seconds, strict=True)]
    for case, end, problem in zip(cases, run_all(jobs), WRONG.values(), strict=True):
        found = list(problems(case, end))
        # On a busy machine, a child may not reach its limit within the guard.
        assert problem in found or (problem.startswith("stopped") and GUARDED in found)


def test_the_harness_finds_what_was_changed(tmp_path: Path) -> None:
    inputs.make(tmp_path)
    before = set(content(tmp_path))
    assert before == set(content(tmp_path))
    kept = tmp_path / "kept.json"
    stat = kept.stat()
    kept.write_text("[]")
    os.utime(kept, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "out" / "new").touch()
    changed = before ^ set(content(tmp_path))
    assert {name for name, _ in changed} == {"kept.json", "out/new"}
