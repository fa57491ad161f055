"""Bounds that the planner must meet, next to the results of a benchmark run.

Bounds are for one thread of an otherwise idle machine and for all cases of the trace. A `--quick`
run uses every 37th case and so has sampling error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CAPACITIES = (3, 4, 6)

# Strategy, mode and lag of a row, the column, and the bound for each capacity.
BALANCE_BOUNDS = (
    ("greedy", "exact", "none", "violations", (0, 0, 0)),
    ("greedy", "exact", "none", "off_node_share", (0.08, 0.04, 0.0)),
    ("greedy", "forecast", "iteration", "p95", (1.11, 1.01, 1.001)),
    ("greedy", "forecast", "iteration", "off_node_share", (None, None, 0.01)),
    ("greedy", "forecast", "microbatch", "p99", (1.03, 1.01, 1.005)),
    ("greedy", "tolerance", "iteration", "mean", (1.005, 1.002, 1.001)),
    ("greedy", "tolerance", "iteration", "replan_share", (0.10, 0.04, 0.02)),
)
# Bounds by ranks, capacity and experts.
SOLVE_BOUNDS_MS = {(1024, 8, 32): 2.0, (256, 2, 256): 0.5, (64, 4, 64): 0.15}
QUOTA_BOUNDS_MS = {(64, 2, 64): 0.12, (256, 2, 256): 1.0}


@dataclass(frozen=True)
class Figure:
    figure: str
    bound: float
    value: float
    met: bool

    @classmethod
    def of(cls, figure: str, bound: float, value: float) -> Figure:
        return cls(figure, float(bound), float(value), value <= bound)


def must_show(result: dict[str, Any]) -> list[Figure]:
    """Return all bounded figures of a result (as written by `--json`)."""
    return [*_times(result), *_balance(result)]


def _times(result: dict[str, Any]) -> Iterator[Figure]:
    for kind, bounds in (("solve", SOLVE_BOUNDS_MS), ("quotas", QUOTA_BOUNDS_MS)):
        for row in result[kind]:
            shape = (row["ranks"], row["capacity"], row["experts"])
            if shape in bounds:
                name = "{} ms, N={} C={} E={}".format(kind, *shape)
                yield Figure.of(name, bounds[shape], row["median_ms"])


def _balance(result: dict[str, Any]) -> Iterator[Figure]:
    for strategy, mode, lag, column, bounds in BALANCE_BOUNDS:
        for capacity, bound in zip(CAPACITIES, bounds, strict=True):
            for row in result["balance"]:
                key = (row["strategy"], row["mode"], row["lag"], row["capacity"])
                if bound is not None and key == (strategy, mode, lag, capacity):
                    name = f"{strategy} {mode} {lag}, C={capacity}: {column}"
                    yield Figure.of(name, bound, row[column])
