"""Times the guard's decision, which is on the critical path: `python -m benchmarks.guard_speed`.

Times are CPU times of one thread, the shortest of many repeats, median over counts. They stand next
to the layer's forward by the cost model, with the paper's experts and tokens per rank.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.adaptive import PAPER_PAIRS
from benchmarks.command_line import parser_of, program
from benchmarks.costs import paper_costs
from benchmarks.report import machine, print_table
from benchmarks.speed import NODE_SIZE, zipf_counts_NE
from megatron_laer.arrays import Int64
from megatron_laer.config import PlanMode
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout

SHAPES = ((16, 3, 32), (64, 2, 64), (64, 4, 64), (256, 2, 256))
REPEATS = 100
CASES = 5
# Forward is one of three passes of the experts and two of four All-to-Alls: at least a third.
FORWARD_SHARE = 1 / 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser_of("benchmarks.guard_speed", __doc__).parse_args(arguments)
    print(json.dumps(machine()))
    print_table(list(guard_times()))
    return 0


def guard_times() -> Iterator[dict[str, Any]]:
    """Yield times by shape and mode; `adaptive` twice, once with free links.

    With free links, bounds of the gain never save it the fresh layout.
    """
    costs = paper_costs()
    free = Link(1e18, 0.0)
    free_costs = replace(costs, cluster=replace(costs.cluster, intra=free, inter=free, spreads=()))
    for num_ranks, capacity, num_experts in SHAPES:
        geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        guards = {
            PlanMode.FORECAST: Guard(PlanMode.FORECAST, costs, geometry),
            PlanMode.EXACT: Guard(PlanMode.EXACT, costs, geometry),
            PlanMode.ADAPTIVE: Guard(PlanMode.ADAPTIVE, costs, geometry),
            "adaptive, free links": Guard(PlanMode.ADAPTIVE, free_costs, geometry),
            "adaptive, tolerance": Guard(PlanMode.ADAPTIVE, costs, geometry, 0.05),
        }
        rng = np.random.default_rng(0)
        cases = []
        for _ in range(CASES):
            now_NE, before_NE = zipf_counts_NE(num_ranks, num_experts, rng)
            planned = construct_layout(before_NE, static, NODE_SIZE)
            cases.append((now_NE * (PAPER_PAIRS // int(now_NE[0].sum())), planned))
        layer_s = statistics.median(costs.layer_seconds(*case, NODE_SIZE) for case in cases)
        for name, guard in guards.items():
            decisions = [guard.decide(*case) for case in cases]
            seconds = statistics.median(_shortest_s(guard, *case) for case in cases)
            yield {
                "ranks": num_ranks,
                "capacity": capacity,
                "experts": num_experts,
                "mode": name,
                "ms": seconds * 1e3,
                "solved": sum(decision.solved for decision in decisions) / CASES,
                "replanned": sum(decision.replanned for decision in decisions) / CASES,
                "forward_ms": layer_s * FORWARD_SHARE * 1e3,
                "share_of_forward": seconds / (layer_s * FORWARD_SHARE),
            }


def _shortest_s(guard: Guard, counts_NE: Int64, planned: ExpertLayout) -> float:
    shortest_s = float("inf")
    for _ in range(REPEATS):
        start = time.thread_time()
        guard.decide(counts_NE, planned)
        shortest_s = min(shortest_s, time.thread_time() - start)
    return shortest_s


if __name__ == "__main__":
    program("python -m benchmarks.guard_speed", main)
