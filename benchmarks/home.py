"""Replicas of home experts: `python -m benchmarks.home --trace TRACE --json OUT [--quick]`.

- `balance`: largest over mean rank load with one or two replica slots per rank, for known counts,
  for those of a microbatch before and of ten steps before. Rows of the real trace, with predicted
  layer times of Mixtral's experts, and of log-normal loads.
- `solve`: processor time as ratios to `sorted`, of homes with one or two replica slots and of rows:
  a layout planned ahead, a fresh one after the gate, and the gate where it solves nothing.
- `nodes`: predicted layer time between nodes, with one to three replica slots, and of rows.
- `launches`: kernels of a layer and microbatch under balanced routing, and stock's.
- `balanced`, `skewed`: training, see `home_training`.

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.costs import paper_costs
from benchmarks.home_nodes import across_nodes
from benchmarks.home_training import training
from benchmarks.launches import BALANCED, count
from benchmarks.report import machine, print_table
from benchmarks.trace_cases import Case, Trace
from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, PlanMode, Sharding
from megatron_laer.planner.balance import max_over_mean
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.home import replicate
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed

NODE_SIZE = 8
# Replicas cost nothing: the best balance that forecasts allow.
FREE = Link(1e18, 0.0)
RANKS, REPLICA_SLOTS = (8, 16, 32), (1, 2)
# Pairs of a rank in a microbatch of 16,384 tokens, for which layers of the trace are priced.
PAIRS = 32768
# The trace has every tenth step.
STEPS_BETWEEN = 10
FIRST, STRIDE, QUICK_STRIDE = 20, 3, 24
SIGMAS = (0.1, 0.3, 0.6, 1.0, 1.5)
DRAWN_SHAPES = ((8, 128), (16, 128), (32, 128), (64, 256))
# N, E and ranks per node; in one node, loads that the construction assigns need no flow.
SOLVED_SHAPES = ((8, 128, 8), (64, 256, 8), (64, 256, 64), (256, 256, 8), (1024, 1024, 8))
SHARDINGS = ((Sharding.EXPERTS, 1), (Sharding.EXPERTS, 2), (Sharding.ROWS, 1))
SORTED = 200_000


@dataclass(frozen=True)
class BalanceRow:
    """Largest over mean rank load of many cases.

    Attributes:
        lag: steps between the counts that a layout is made for and those that it meets; 0 for known
            counts, 1 for the microbatch before.
        loads: the trace, or log-normal loads by sigma.
        layer_ms: predicted mean, with exchanges; None for log-normal loads.
    """

    ranks: int
    experts: int
    lag: int
    loads: str
    planner: str
    replica_slots: int
    cases: int
    mean: float
    p95: float
    p99: float
    max: float
    replicas_per_rank: float
    layer_ms: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.home", __doc__)
    parser.add_argument("--trace", type=Path, help="npz file with tokens, for balance")
    parser.add_argument("--quick", action="store_true", help="few cases, and a small model")
    parts = ("balance", "solve", "nodes", "launches", "training")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="default: all")
    add_json(parser)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine()}
    if "balance" in options.only:
        if options.trace is None:
            raise ValueError("balance needs --trace; give one, or --only with other parts")
        found["balance"] = [asdict(row) for row in _balance(Trace(options.trace), options.quick)]
    if "solve" in options.only:
        found["solve"] = list(solve_times(3 if options.quick else 9))
    if "nodes" in options.only:
        found["nodes"] = list(across_nodes(1 if options.quick else 4))
    if "launches" in options.only:
        found["launches"] = {case.sharding: count(case)["kinds"] for case in BALANCED}
    if "training" in options.only:
        found |= training(quick=options.quick)
    print(json.dumps(found["machine"]))
    for part in ("balance", "solve", "nodes"):
        print_table(found.get(part, []))
    print_table([{"of": name, **kinds} for name, kinds in found.get("launches", {}).items()])
    for ranks, of in found.get("balanced", {}).items():
        print_table([{"forced balance on": ranks, **of["cpu_ratio"], "bytes": of["weight_bytes"]}])
    print_table([{"routing": name, **of} for name, of in found.get("skewed", {}).items()])
    write_json(options.json, found)
    return 0


def _balance(trace: Trace, quick: bool) -> Iterator[BalanceRow]:
    for num_ranks in RANKS:
        for spare in REPLICA_SLOTS:
            yield from trace_balance(trace, num_ranks, QUICK_STRIDE if quick else STRIDE, spare)
    yield from drawn_balance(5 if quick else 40)


def trace_balance(
    trace: Trace, num_ranks: int, stride: int, spare: int = 1
) -> Iterator[BalanceRow]:
    """Compare layouts on the trace: the construction, and `greedy` with free links and priced."""
    geometry = homes(num_ranks, trace.counts.shape[-1], spare)
    costs = replace(paper_costs(), pairs_per_rank=PAIRS)
    free = replace(costs.cluster, intra=FREE, inter=FREE, spreads=())
    greedy = GreedyStrategy(geometry, replace(costs, cluster=free))
    by_layout = costs.with_exchange(Auto.AUTO, geometry)
    priced = GreedyStrategy(geometry, by_layout)
    planners: dict[str, Callable[[Int64], ExpertLayout]] = {
        "construction": lambda counts_NE: replicate(counts_NE, geometry).layout,
        "greedy, free links": lambda counts_NE: greedy.plan(counts_NE, geometry.static_layout),
        "greedy": lambda counts_NE: priced.plan(counts_NE, geometry.static_layout),
    }
    cases = trace_cases(trace, stride)
    for lag in (0, 1, STEPS_BETWEEN):
        for name, plan in planners.items():
            layouts, ratios, layer_s = [], [], []
            for case in cases:
                counts_NE = on_ranks(trace.now(case), num_ranks)
                layouts.append(plan(on_ranks(counts_before(trace, case, lag), num_ranks)))
                ratios.append(imbalance(counts_NE, layouts[-1]))
                scaled_NE = counts_NE * (PAIRS // int(counts_NE[0].sum()))
                layer_s.append(layer_seconds(by_layout, geometry, scaled_NE, layouts[-1]))
            row = row_of(geometry, lag, "trace", name, layouts, ratios)
            yield replace(row, layer_ms=float(np.mean(layer_s)) * 1e3)


def drawn_balance(draws: int) -> Iterator[BalanceRow]:
    """Construct layouts for log-normal loads, with one and with two replica slots."""
    for num_ranks, num_experts in DRAWN_SHAPES:
        for spare in REPLICA_SLOTS:
            geometry = homes(num_ranks, num_experts, spare)
            for sigma in SIGMAS:
                rng = np.random.default_rng(1)
                layouts, ratios = [], []
                for _ in range(draws):
                    counts_NE = drawn_counts_NE(num_ranks, num_experts, sigma, rng)
                    layouts.append(replicate(counts_NE, geometry).layout)
                    ratios.append(imbalance(counts_NE, layouts[-1]))
                loads = f"log-normal {sigma}"
                yield row_of(geometry, 0, loads, "construction", layouts, ratios)


def solve_times(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the least processor times of solves, as ratios to a sort in the same run."""
    rng = np.random.default_rng(0)
    numbers = rng.random(SORTED).tolist()
    for (num_ranks, num_experts, node_size), (sharding, spare) in product(SOLVED_SHAPES, SHARDINGS):
        capacity = num_experts // num_ranks + spare
        geometry = Geometry(num_ranks, num_experts, capacity, node_size, sharding)
        counts_NE = drawn_counts_NE(num_ranks, num_experts, 0.6, rng)
        even_NE = np.full_like(counts_NE, counts_NE.mean())
        static = geometry.static_layout
        costs = paper_costs().with_exchange(Auto.AUTO, geometry)
        fresh, gate = (Guard(mode, costs, geometry) for mode in (PlanMode.EXACT, PlanMode.ADAPTIVE))
        runs: dict[str, Callable[[], object]] = {
            "sorted": partial(sorted, numbers),
            "planned": partial(GreedyStrategy(geometry, costs).plan, counts_NE, static),
            "fresh": partial(fresh.decide, counts_NE, static),
            "gate": partial(gate.decide, even_NE, static),
        }
        times_s: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times_s[name].append(_seconds(run))
        sorted_s, *others_s = map(min, times_s.values())
        ratios = zip([*runs][1:], (seconds / sorted_s for seconds in others_s), strict=True)
        shape = {"ranks": num_ranks, "experts": num_experts, "ranks per node": node_size}
        slots = {"sharding": sharding.value, "replica slots": spare}
        yield {**shape, **slots, **dict(ratios), "sorted_ms": sorted_s * 1e3}


def homes(num_ranks: int, num_experts: int, replica_slots: int = 1) -> Geometry:
    node_size = min(num_ranks, NODE_SIZE)
    if num_ranks % node_size:
        node_size = num_ranks
    capacity = num_experts // num_ranks + replica_slots
    return Geometry(num_ranks, num_experts, capacity, node_size, Sharding.EXPERTS)


def drawn_counts_NE(
    num_ranks: int, num_experts: int, sigma: float, rng: np.random.Generator
) -> Int64:
    share_E = rng.lognormal(0, sigma, num_experts)
    counts_NE: Int64 = rng.multinomial(4096 * 8, share_E / share_E.sum(), size=num_ranks).astype(
        np.int64
    )
    return counts_NE


def trace_cases(trace: Trace, stride: int) -> list[Case]:
    """Return cases after the first steps whose microbatch has one before it."""
    iterations, layers = trace.counts.shape[:2]
    return [
        Case(iteration, layer, 1)
        for iteration in range(FIRST, iterations, stride)
        for layer in range(layers)
    ]


def counts_before(trace: Trace, case: Case, lag: int) -> Int64:
    if lag == STEPS_BETWEEN:
        counts_NE: Int64 = trace.counts[case.iteration - 1, case.layer].sum(axis=0)
        return counts_NE
    return trace.now(Case(case.iteration, case.layer, case.microbatch - lag))


def on_ranks(counts_NE: Int64, num_ranks: int) -> Int64:
    """Add up neighbouring ranks of the trace, or repeat them."""
    traced = len(counts_NE)
    if num_ranks > traced:
        return np.repeat(counts_NE, num_ranks // traced, axis=0)
    summed_NE: Int64 = counts_NE.reshape(num_ranks, traced // num_ranks, -1).sum(axis=1)
    return summed_NE


def imbalance(counts_NE: Int64, layout: ExpertLayout) -> float:
    node_size = homes(layout.num_ranks, layout.num_experts).node_size
    return max_over_mean(exact_split(layout, node_size).solve(counts_NE).rank_loads_N())


def layer_seconds(
    costs: CostModel, geometry: Geometry, counts_NE: Int64, layout: ExpertLayout
) -> float:
    """Predict a layer with its exchanges of weights and gradients."""
    placed = Placed(layout, geometry)
    layer_s = costs.layer_seconds(counts_NE, placed)
    return layer_s + costs.exchanges_seconds(placed, layer_s)


def row_of(
    geometry: Geometry,
    lag: int,
    loads: str,
    planner: str,
    layouts: Sequence[ExpertLayout],
    ratios: Sequence[float],
) -> BalanceRow:
    filled = [int(layout.replicas_E.sum()) - geometry.num_experts for layout in layouts]
    return BalanceRow(
        geometry.num_ranks,
        geometry.num_experts,
        lag,
        loads,
        planner,
        geometry.capacity - geometry.home_slots,
        len(ratios),
        float(np.mean(ratios)),
        float(np.quantile(ratios, 0.95)),
        float(np.quantile(ratios, 0.99)),
        max(ratios),
        float(np.mean(filled)) / geometry.num_ranks,
    )


def _seconds(run: Callable[[], object]) -> float:
    start_s = time.thread_time()
    run()
    return time.thread_time() - start_s


if __name__ == "__main__":
    program("python -m benchmarks.home", main)
