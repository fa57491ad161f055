"""Trials of all bad inputs, and the judgement of their ends."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bad_inputs import fields, inputs, paths, programs, recordings, report, variables
from tests.bad_inputs.case import Case
from tests.bad_inputs.forks import Ended, Job, run_all

_LONGEST = 2500


def make(folder: Path) -> None:
    for part in (inputs, report, recordings, programs, paths, fields, variables):
        part.make(folder)


def tried(folder: Path, cases: Sequence[Case]) -> list[Ended]:
    return list(run_all(Job(case.words, str(folder), case.environment) for case in cases))


def problems(case: Case, ended: Ended) -> Iterator[str]:
    if ended.limit:
        yield f"stopped by {ended.limit}"
    if ended.status != case.status:
        yield f"status {ended.status}"
    if "Traceback" in ended.errors:
        yield "a traceback"
    is_refused = case.status == 2
    lines = _messages(ended.errors)
    if is_refused and len(lines) != 1:
        yield f"messages: {len(lines)}"
    if case.says not in (ended.errors if is_refused else ended.output + ended.errors):
        yield f"does not say {case.says!r}"
    is_script = case.words[:1] == ("train",)  # which may print anything
    printed = ended.errors if is_script else ended.errors + ended.output
    if not printed.replace("\n", "").isprintable():
        yield "control characters"
    if is_refused and not is_script:
        if ended.output and not case.prints:
            yield f"prints {ended.output[:200]!r}"
        if len(ended.errors) > _LONGEST:
            yield f"{len(ended.errors)} characters"


def _messages(errors: str) -> list[str]:
    """Return lines on stderr, without argparse's usage and the further lines of a message."""
    lines = errors.splitlines()
    return [line for line in lines if not line.startswith((" ", "usage:"))]


def failures(cases: Sequence[Case], ended: Sequence[Ended]) -> Iterator[str]:
    """Yield a text on each case that ended wrongly."""
    for case, end in zip(cases, ended, strict=True):
        if found := list(problems(case, end)):
            words = " ".join(case.words)[-300:]
            yield f"{words!r} {case.environment}: {'; '.join(found)}\n    {end.errors[-600:]!r}"


def content(folder: Path) -> Iterator[tuple[str, str]]:
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
