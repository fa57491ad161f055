"""Some runs with their faults, one after the other, and a table of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.checks import cut_from, problems
from tests.chaos.job import run_job
from tests.chaos.plans import Plan, Variant, plans


class Chaos:
    """Runs in one folder, with one undisturbed run of each kind; `data` is a dataset's prefix."""

    def __init__(self, data: str, folder: Path) -> None:
        self._data = data
        self._folder = folder
        self._undisturbed: dict[Variant, Path] = {}

    def run(self, plan: Plan, name: str) -> tuple[str, list[str]]:
        expected = self._without_faults(plan.variant)
        began_s = time.monotonic()
        outcome = run_job(plan, self._data, self._folder / name, expected)
        found = problems(plan, outcome, expected)
        cells = (
            plan.variant.name,
            "saves at TERM" if plan.handles_term else "",
            "; ".join(map(str, plan.faults)),
            ", ".join(outcome.starts),
            f"cut from {cut_from(outcome.folder)}",
            f"{time.monotonic() - began_s:.0f} s",
            "; ".join(found) or "equal",
        )
        if not found:
            shutil.rmtree(outcome.folder)
        return " | ".join(cells), found

    def _without_faults(self, variant: Variant) -> Path:
        if variant not in self._undisturbed:
            folder = self._folder / f"undisturbed-{len(self._undisturbed)}"
            outcome = run_job(Plan(variant, False, ()), self._data, folder)
            assert not outcome.problem, f"{variant.name}, without faults: {outcome}"
            self._undisturbed[variant] = folder
        return self._undisturbed[variant]


def chaos(
    runs: int, seed: int, data: str, folder: Path, only: Sequence[int] | None = None
) -> list[str]:
    """Make the runs of a seed, or `only` some by number; print a line each, return problems."""
    made, failed = Chaos(data, folder), []
    print("run | kind | | faults | starts, each with its last step and exit codes | moved | time |")
    for number, plan in enumerate(plans(runs, seed)):
        if only is not None and number not in only:
            continue
        line, found = made.run(plan, f"run-{number}")
        print(f"{number} | {line}", flush=True)
        failed += [f"run {number}: {problem}" for problem in found]
    print(f"{len(failed)} problems", *failed, sep="\n", flush=True)
    return failed
