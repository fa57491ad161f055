"""Training with experts at home: processor time of steps against stock, and bytes of weights.

Part of `python -m benchmarks.home`. Configurations are those of `benchmarks.end_to_end`, with its
forced balance around every two runs. Wall times of ranks that share cores would say nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import routing
from benchmarks.end_to_end import Run, cpu_times, run_all
from benchmarks.end_to_end_cases import HALF, QUICK, Configuration, Size, configurations

ROWS, AT_HOME = " --fsep-sharding rows", " --fsep-sharding experts"
# Bursts are left to `end_to_end`.
SKEWS = ("fixed", "drifting", *(name for name in routing.REPLAYED if name != "W0"))
PAIRS, STEPS = 5, 8


def training(*, quick: bool) -> dict[str, Any]:
    """Measure forced balance on 2 and 4 ranks, and skewed routing on 2."""
    size = replace(QUICK if quick else HALF, repeats=2 if quick else PAIRS)
    found: dict[str, Any] = {"balanced": {}, "skewed": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in (2, 4):
            cases = [*_balanced(size, ranks, Path(scratch))]
            runs = run_all(replace(size, steps=STEPS), ranks, cases, Path(scratch))
            (name,) = (case.name for case in cases[1:])
            found["balanced"][f"{ranks} ranks"] = {
                "cpu_ratio": _spread([1 / share for share in _shares(runs[name], size)]),
                "weight_bytes": _moved(runs[name]),
            }
        size = replace(size, repeats=2 if quick else 3)
        runs = run_all(size, 2, [*_skewed(size, 2, Path(scratch))], Path(scratch))
    for skew in SKEWS:
        at_home, rows = runs[f"fsep experts, {skew}"], runs[f"fsep, {skew}"]
        found["skewed"][skew] = {
            "share": statistics.median(_shares(at_home, size)),
            "rows_share": statistics.median(_shares(rows, size)),
            "max_over_mean": _imbalance(at_home),
            "rows_max_over_mean": _imbalance(rows),
            "weight_MB": _moved(at_home) / 1e6,
            "rows_weight_MB": _moved(rows) / 1e6,
        }
    return found


def _balanced(size: Size, ranks: int, scratch: Path) -> Iterator[Configuration]:
    of_name = {case.name: case for case in configurations(size, ranks, scratch)}
    ideal, fsep = of_name["ideal"], of_name["fsep balanced, adaptive"]
    steps = size.warm_up + STEPS
    yield replace(ideal, steps=steps)
    yield replace(fsep, name="fsep experts, balanced", flags=fsep.flags + AT_HOME, steps=steps)


def _skewed(size: Size, ranks: int, scratch: Path) -> Iterator[Configuration]:
    of_name = {case.name: case for case in configurations(size, ranks, scratch)}
    yield of_name["ideal"]
    for skew in SKEWS:
        fsep = of_name[f"fsep, {skew}"]
        yield replace(fsep, flags=fsep.flags + ROWS)
        yield replace(fsep, name=f"fsep experts, {skew}", flags=fsep.flags + AT_HOME)


def _shares(runs: list[Run], size: Size) -> list[float]:
    """Return the neighbours' processor time per step over each run's own."""

    def cpu_ms(run: Run) -> float:
        return statistics.fmean(cpu_times(size, run))

    return [statistics.fmean(map(cpu_ms, run.ideals)) / cpu_ms(run) for run in runs]


def _imbalance(runs: list[Run]) -> float:
    return statistics.fmean(ratio for run in runs for ratio in run.ranks[0].fsep_skew)


def _moved(runs: list[Run]) -> int:
    """Return the bytes of weights and gradients of all runs and ranks."""
    return sum(of.weight_bytes for run in runs for of in run.ranks)


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
