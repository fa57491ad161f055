"""Measures the `solve` constants of a cluster file on this host: `python -m benchmarks.solve_fit`.

They are what the guard adds when it replans: a fresh layout, its exact quotas and their cost. What
is measured is CPU time of one thread, the shortest of many repeats, so that a busy machine does not
count; then a fit of relative errors that is linear in slots and counts.
"""

from __future__ import annotations

import json
import time

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from benchmarks.costs import paper_costs
from benchmarks.report import machine, print_table
from benchmarks.speed import NODE_SIZE, zipf_counts_NE
from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split

REPEATS = 40
SHAPES = (
    *((2, 3, 4), (8, 2, 8), (8, 4, 8), (16, 3, 32), (16, 4, 32), (16, 6, 32), (32, 2, 8)),
    *((32, 4, 16), (64, 2, 64), (64, 4, 64), (64, 8, 256), (128, 2, 128), (256, 2, 256)),
    *((256, 4, 64), (512, 2, 64), (1024, 8, 32)),
)


def main() -> None:
    """Measure, fit, print."""
    rng = np.random.default_rng(0)
    costs = paper_costs()
    seconds = []
    for num_ranks, capacity, num_experts in SHAPES:
        node_size = min(NODE_SIZE, num_ranks)
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        cases = []
        for _ in range(5):
            now_NE, before_NE = zipf_counts_NE(num_ranks, num_experts, rng)
            planned = construct_layout(before_NE, static, node_size)
            cases.append(min(_solve_s(costs, now_NE, planned, node_size) for _ in range(REPEATS)))
        seconds.append(float(np.median(cases)))
    terms = np.array([(1, ranks * slots, ranks * experts) for ranks, slots, experts in SHAPES])
    times = np.array(seconds)
    fit, _ = nnls(terms / times[:, None], np.ones(len(SHAPES)))
    print(json.dumps(machine()))
    print_table(
        [
            {"ranks": shape[0], "capacity": shape[1], "experts": shape[2], "ms": s * 1e3, "fit": f}
            for shape, s, f in zip(SHAPES, seconds, terms @ fit * 1e3, strict=True)
        ]
    )
    base_s, slot_s, count_s = fit.tolist()
    print(f"solve: {{base_s: {base_s:.2e}, slot_s: {slot_s:.2e}, count_s: {count_s:.2e}}}")


def _solve_s(costs: CostModel, counts_NE: Int64, planned: ExpertLayout, node_size: int) -> float:
    start = time.thread_time()
    layout = construct_layout(counts_NE, planned, node_size)
    quotas = exact_split(layout, node_size).solve(counts_NE)
    costs.split_seconds(quotas.totals(), layout, node_size)
    return time.thread_time() - start


if __name__ == "__main__":
    main()
