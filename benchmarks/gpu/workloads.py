"""Training's share of forced balance under W0 to W7, and what it waits for, stock and FSEP.

Under torchrun: `-m benchmarks.gpu.workloads --data PREFIX`. The share is the throughput of a run
relative to stock Megatron with `--moe-router-force-load-balancing`, run before and after it.
Megatron's router replay imposes the routing. W4 is omitted: Megatron's microbatches have the same
number of tokens on every rank.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.end_to_end_cases import FSEP
from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from benchmarks.gpu.timing import Times
from benchmarks.routing import REPLAYED, replayed
from benchmarks.training_run import Measured, Routing, measure

_FORCED = Routing("--moe-router-force-load-balancing")
_SIDES = {"stock": [], "fsep": FSEP.split()}
_DRY_WORKLOADS = ("W2",)


@dataclass(frozen=True)
class Case:
    """Measurements of one run, and of the forced balance around it."""

    workload: str
    side: str
    measured: Measured
    forced: tuple[Measured, ...]


def measure_workloads(ranks: Ranks) -> Part:
    """Train under each workload, with forced balance in between."""
    part = Part(left_out=["W4: Megatron's microbatches have as many tokens on every rank"])
    size = replace(ranks.model, experts=ranks.model.experts * ranks.size)
    flags = [*size.flags(ranks.data, ranks.size), *ranks.backend_flags()]
    shape = size.routing_shape(ranks.size)
    steps = size.warm_up + size.steps

    def train(routing: Routing, more: list[str]) -> Measured | None:
        return measure([*flags, *more], routing, shape, steps) if ranks.may_run() else None

    cases: list[Case] = []
    forced = train(_FORCED, [])
    balanced = train(_FORCED, _SIDES["fsep"])
    if forced is not None and balanced is not None:
        cases.append(Case("forced balance", "fsep", balanced, (forced,)))
    for name in _DRY_WORKLOADS if ranks.dry else REPLAYED:
        path = ranks.folder / f"{name}.npy"
        if ranks.rank == 0:
            np.save(path, replayed(name, shape, steps + 1))
        routing = Routing("--moe-enable-routing-replay", trace=path)
        found = {side: train(routing, more) for side, more in _SIDES.items()}
        after = train(_FORCED, [])
        around = tuple(each for each in (forced, after) if each is not None)
        for side, measured in found.items():
            if measured is None:
                part.left_out.append(f"{side} under {name}: the time was spent")
            elif around:
                cases.append(Case(name, side, measured, around))
        forced = after
    part.tables["Share of forced balance"] = rows(cases, size.warm_up)
    return part


def rows(cases: list[Case], warm_up: int) -> list[dict[str, Any]]:
    """Return the table of workloads; it has means, since bursts count."""

    def mean_ms(measured: Measured) -> float:
        return statistics.fmean(measured.step_ms[warm_up:])

    return [
        {
            "workload": case.workload,
            "side": case.side,
            **Times.of(case.measured.step_ms[warm_up:]).cells("step "),
            "share of forced balance": statistics.fmean(map(mean_ms, case.forced))
            / mean_ms(case.measured),
            "stock max/mean": statistics.fmean(case.measured.stock_skew[warm_up:]),
            "restore exposed ms": _mean(case.measured.restore_exposed_ms[warm_up:]),
            "reduce exposed ms": _mean(case.measured.reduce_exposed_ms[warm_up:]),
        }
        for case in cases
    ]


def _mean(values: list[float]) -> float | str:
    return statistics.fmean(values) if values else ""


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure_workloads))
