"""Checks of a run with faults against an undisturbed one of the same kind."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.chaos.job import Outcome
from tests.chaos.plans import Plan
from tests.processes import outlive
from tests.records import without_run

# Fields of a metrics recording that do not depend on a clock.
_DETERMINED = ("max_over_mean", "stock_max_over_mean", "predicted_ms")
_CUT = ".cut-from-"


def problems(plan: Plan, outcome: Outcome, undisturbed: Path) -> list[str]:
    if outcome.problem:
        return [outcome.problem]
    checks = (_steps, _recordings, _leftovers)
    found = [problem for check in checks for problem in check(plan, outcome.folder, undisturbed)]
    for start, words in outcome.expected:
        logs = [
            outcome.folder.glob(f"start-{later}-*.log")
            for later in range(start, len(outcome.starts))
        ]
        if not any(words in path.read_text() for of_start in logs for path in of_start):
            found.append(f"no start from {start} on logged {words!r}")
    orphans = outlive(process.pid for process in outcome.started if process.is_running())
    return found + [f"process {pid} is left" for pid in orphans]


def cut_from(folder: Path) -> list[int]:
    """Return the steps from which a group's routing was moved aside, once for each time."""
    names = [path.name for path in folder.glob(f"recorded-*/group-0{_CUT}*.trace")]
    return sorted(int(name.split(_CUT)[1].split(".")[0]) for name in names)


def _steps(plan: Plan, folder: Path, undisturbed: Path) -> Iterator[str]:
    """Compare every step of every start with the undisturbed run's, to the last bit."""
    for path in sorted(undisturbed.glob("rank-*.jsonl")):
        expected = {line["step"]: line for line in _lines(path)}
        made = _lines(folder / path.name)
        # A rank that a part of the run alone has, has not all steps.
        if {line["step"] for line in made} != {*expected} or len({*expected}) > plan.steps:
            yield f"{path.stem} made the steps {[line['step'] for line in made]}"
        for line in made:
            other = expected.get(line["step"], {})
            differ = [key for key in line if line[key] != other[key]]
            if differ:
                yield f"{path.stem}: step {line['step'] + 1} differs in {', '.join(differ)}"
                break


def _recordings(plan: Plan, folder: Path, undisturbed: Path) -> Iterator[str]:
    """Compare layouts and routing byte for byte, and metrics except times."""
    recorded = set[int]()
    for path in sorted(undisturbed.glob("recorded-*/group-*.*")):
        name = path.relative_to(undisturbed)
        if path.suffix != ".metrics":
            if without_run(folder / name) != without_run(path):
                yield f"{name} differs"
            continue
        mine, other = read_metrics(folder / name), read_metrics(path)
        recorded |= {*other.steps_T.tolist()}
        if mine.steps_T.tolist() != other.steps_T.tolist():
            yield f"{name} holds the steps {mine.steps_T.tolist()}"
            continue
        if (mine.rank_tokens_TLN != other.rank_tokens_TLN).any():
            yield f"{name} differs in tokens"
        for value in _DETERMINED:
            if (mine.of_layers[value] != other.of_layers[value]).any():
                yield f"{name} differs in {value}"
    if recorded != {*range(plan.steps)}:
        yield f"the undisturbed run recorded the steps {sorted(recorded)}"


def _leftovers(_plan: Plan, folder: Path, _undisturbed: Path) -> Iterator[str]:
    """Find temporary files, and files that a process holds."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".tmp"):
            yield f"{path.relative_to(folder)} is left"
        elif path.is_file():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield f"{path.relative_to(folder)} is locked"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
