"""Tables of the time of layouts and quotas on one thread, as medians.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.costs import paper_costs
from benchmarks.report import least_ms, median_ms
from megatron_laer.arrays import Int64
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.exact import ExactSplit, exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import make_strategy

NODE_SIZE = 8
SOLVE_SHAPES = ((1024, 8, 32), (256, 2, 256), (64, 4, 64), (16, 3, 32), (16, 4, 32), (16, 6, 32))
GROWTH_SHAPES = tuple(
    (ranks, capacity, experts)
    for capacity, experts in ((8, 32), (4, 64))
    for ranks in (64, 128, 256, 512, 1024, 2048, 4096)
)
QUOTA_SHAPES = ((64, 64), (256, 256))
# Series of growing shapes: as many experts as ranks, and more ranks than experts.
RELATIVE_SHAPES = (
    *((ranks, 2, ranks) for ranks in (64, 256, 512, 1024)),
    *((ranks, 4, 64) for ranks in (64, 256, 1024, 4096)),
    *((ranks, 8, 32) for ranks in (64, 256, 1024, 4096)),
)


def zipf_counts_NE(
    num_ranks: int, num_experts: int, rng: np.random.Generator
) -> tuple[Int64, Int64]:
    """Return counts of a Zipf 1.0 workload, and those before each expert drifted by up to 20 %."""
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1))
    before_E = share_E * rng.uniform(0.8, 1.2, num_experts)
    now_NE = rng.multinomial(8192, share_E / share_E.sum(), size=num_ranks)
    before_NE = rng.multinomial(8192, before_E / before_E.sum(), size=num_ranks)
    return now_NE.astype(np.int64), before_NE.astype(np.int64)


def solve_times(shapes: Sequence[tuple[int, int, int]], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the times of a fresh layout and of one for a forecast, medians over several counts.

    `median_ms` is the slower of the two.
    """
    for num_ranks, capacity, num_experts in shapes:
        node_size = min(NODE_SIZE, num_ranks)
        geometry = Geometry(num_ranks, num_experts, capacity, node_size)
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        greedy = make_strategy("greedy", geometry=geometry, costs=paper_costs())
        rng = np.random.default_rng(0)
        fresh_ms, greedy_ms = [], []
        for _ in range(5):
            counts_NE, _ = zipf_counts_NE(num_ranks, num_experts, rng)
            fresh = partial(construct_layout, counts_NE, static, node_size)
            fresh_ms.append(median_ms(fresh, repeats))
            greedy_ms.append(median_ms(partial(greedy.plan, counts_NE, static), repeats))
        yield {
            "ranks": num_ranks,
            "capacity": capacity,
            "experts": num_experts,
            "median_ms": max(statistics.median(fresh_ms), statistics.median(greedy_ms)),
            "fresh_median_ms": statistics.median(fresh_ms),
            "greedy_median_ms": statistics.median(greedy_ms),
        }


def relative_times(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield processor times of layouts, quotas and the choice by time, as parts of a yardstick.

    The yardstick is `sorted` of 200,000 numbers on the same thread. Least times count, which other
    work on the machine disturbs least. Each time is followed by its exponent, by which it grows
    with the ranks since the shape before.
    """
    numbers = np.random.default_rng(0).random(200_000).tolist()
    before: dict[str, Any] = {}
    for num_ranks, capacity, num_experts in RELATIVE_SHAPES:
        node_size = min(NODE_SIZE, num_ranks)
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        geometry = Geometry(num_ranks, num_experts, capacity, node_size)
        greedy = make_strategy("greedy", geometry=geometry, costs=paper_costs())
        now_NE, before_NE = zipf_counts_NE(num_ranks, num_experts, np.random.default_rng(0))
        split = exact_split(construct_layout(before_NE, static, node_size), node_size)
        unit_ms = least_ms(partial(sorted, numbers), repeats)
        row: dict[str, Any] = {"ranks": num_ranks, "capacity": capacity, "experts": num_experts}
        is_first = before.get("capacity") != capacity
        for name, run in (
            ("fresh", partial(construct_layout, now_NE, static, node_size)),
            ("quotas", partial(split.solve, now_NE)),
            ("choice", partial(greedy.plan, before_NE, static)),
        ):
            row[name] = least_ms(run, repeats) / unit_ms
            growth = None if is_first else row[name] / before[name]
            row[f"{name} grows"] = growth and math.log(growth, num_ranks / before["ranks"])
        yield row
        before = row


def quota_times(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield times of the solve, one row and one rank's columns, C = 2, after a drift of 20 %."""
    capacity = 2
    for num_ranks, num_experts in QUOTA_SHAPES:
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        rng = np.random.default_rng(0)
        solve_ms = []
        for _ in range(7):
            now_NE, before_NE = zipf_counts_NE(num_ranks, num_experts, rng)
            split = exact_split(construct_layout(before_NE, static, NODE_SIZE), NODE_SIZE)
            solve_ms.append(median_ms(partial(_solve_for_one_rank, split, now_NE), repeats))
        yield {
            "ranks": num_ranks,
            "experts": num_experts,
            "capacity": capacity,
            "workload": "zipf-1.0",
            "median_ms": statistics.median(solve_ms),
        }


def _solve_for_one_rank(split: ExactSplit, counts_NE: Int64) -> None:
    quotas = split.solve(counts_NE)
    quotas.rank_row(1)
    quotas.rank_columns(1)
