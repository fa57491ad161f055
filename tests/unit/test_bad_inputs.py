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

from tests.bad_inputs import inputs
from tests.bad_inputs.cases import Case, all_cases
from tests.bad_inputs.forks import Ended, Job, run_all
from tests.parity.flags import command_line

pytestmark = [pytest.mark.unit, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pretrain_gpt.py"
TRAINING = command_line("absent", experts=8, expert_parallel=2, global_batch=4, steps=1)
CASES = tuple(all_cases(str(SCRIPT), tuple(TRAINING)))
LEAST = 400


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Ended], dict[str, str]]:
    """How each case ended, and what has changed in the folder of the inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs.make(folder)
    before = dict(_content(folder))
    jobs = [Job(case.words, str(folder), case.environment) for case in CASES]
    ended = list(run_all(jobs))
    after = dict(_content(folder))
    changed = {
        name: f"{before.get(name)} -> {after.get(name)}"
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }
    return ended, changed


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
    tried: tuple[list[Ended], dict[str, str]],
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


def test_no_bad_input_changes_a_file(tried: tuple[list[Ended], dict[str, str]]) -> None:
    _, changed = tried
    assert changed == {}


def test_there_are_hundreds_of_different_bad_inputs() -> None:
    different = {(case.words, tuple(sorted(case.environment.items()))) for case in CASES}
    assert len(different) == len(CASES) >= LEAST
