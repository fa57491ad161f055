"""Training's share of forced balance under W0 to W7, and what it waits for, stock and FSEP.

Under torchrun: `-m benchmarks.gpu.workloads --data PREFIX`. The share is the throughput of a run
relative to stock Megatron with `--moe-router-force-load-balancing`, run before and after it.
Megatron's router replay imposes the routing. W4 is omitted: Megatron's microbatches have the same
number of tokens on every rank.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.end_to_end_cases import FSEP, Size
from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from benchmarks.gpu.timing import Times
from benchmarks.routing import REPLAYED, replayed
from benchmarks.training_run import Measured, Routing, measure

_FORCED = Routing("--moe-router-force-load-balancing")
_SIDES = {"stock": [], "fsep": FSEP.split()}
# The first one decides most, so it is measured with long microbatches as well.
_WORKLOADS = ("W2", *(name for name in REPLAYED if name != "W2"))
_LONG = 4  # sequences of a microbatch


@dataclass(frozen=True)
class Case:
    """Measurements of one run, and of the forced balance around it."""

    workload: str
    side: str
    tokens: int
    measured: Measured
    forced: tuple[Measured, ...]


def measure_workloads(ranks: Ranks) -> Part:
    """Train under each workload, with forced balance in between."""
    part = ranks.part()
    part.left_out.append("W4: Megatron's microbatches have as many tokens on every rank")
    size = replace(ranks.model, experts=ranks.model.experts * ranks.size)
    sizes = [(size, _WORKLOADS[:1])]
    if not ranks.dry:
        long = replace(size, sequences=_LONG * size.sequences)
        sizes += [(long, _WORKLOADS[:1]), (size, _WORKLOADS[1:])]
    cases = [case for each, names in sizes for case in _cases(ranks, each, names, part)]
    part.tables["Share of forced balance"] = rows(cases, size.warm_up)
    return part


def _cases(ranks: Ranks, size: Size, names: Sequence[str], part: Part) -> Iterator[Case]:
    flags, shape = ranks.flags(size, ranks.size), size.routing_shape(ranks.size)
    steps = size.warm_up + size.steps

    def train(routing: Routing, more: list[str]) -> Measured | None:
        return measure([*flags, *more], routing, shape, steps) if ranks.may_run() else None

    forced = train(_FORCED, [])
    balanced = train(_FORCED, _SIDES["fsep"])
    if forced is not None and balanced is not None:
        yield Case("forced balance", "fsep", shape.tokens, balanced, (forced,))
    for name in names:
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
                yield Case(name, side, shape.tokens, measured, around)
        forced = after


def rows(cases: list[Case], warm_up: int) -> list[dict[str, Any]]:
    """Return the table of workloads; it has means, since bursts count."""

    def mean_ms(measured: Measured) -> float:
        return statistics.fmean(measured.step_ms[warm_up:])

    return [
        {
            "workload": case.workload,
            "side": case.side,
            "tokens": case.tokens,
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
