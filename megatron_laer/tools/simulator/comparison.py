"""Comparison of strategies and modes on every microbatch of a trace: the rows of `plan`.

As in training, each layer's layout is planned once per step, from the counts of earlier steps.

Legend: N ranks, E experts, R records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode, Sharding, Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.outcome import Outcome, price
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.simulator.replay import (
    LayerPolicy,
    Observed,
    busiest_rank,
    changed_traffic,
    layer_steps,
    walk,
)
from megatron_laer.tools.traces.records import Trace

STOCK = "stock EP"

# `adaptive` with a threshold on max/mean in place of the predicted cost.
TOLERANCE = "tolerance"
MODES = (*(mode.value for mode in GUARD_MODES), TOLERANCE)

# Always in mode `forecast`: layouts made after the gate would hide their own.
BASELINES = ("static", "laer")


@dataclass(frozen=True)
class PlanRow:
    """One strategy and mode over all cases; the legend of `plan` explains them.

    Cases are microbatches of one layer, with tokens and an earlier step.
    """

    strategy: str
    mode: str
    capacity: int
    cases: int
    mean: float
    p99: float
    off_node_share: float
    replan_share: float
    restored_bytes: float
    layer_ms: float


class _Planner:
    """Strategy, or stock EP, with its layouts by layer, and the cases of each mode."""

    def __init__(self, name: str, guards: Mapping[str, Guard]) -> None:
        guard = next(iter(guards.values()))
        costs, geometry = guard.costs, guard.geometry
        self._name, self._costs, self._geometry, self._guards = name, costs, geometry, guards
        self._cases: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in guards}
        strategy = None
        if name != STOCK:
            strategy = make_strategy(name, geometry=geometry, costs=costs)
        self._layers: defaultdict[int, LayerPolicy] = defaultdict(
            lambda: LayerPolicy(strategy, geometry.static_layout, lays_out_freely(name))
        )
        self._planned, self._ahead_bytes = geometry.static_layout, 0

    def plan(self, layer: int, observed: Observed) -> None:
        """Plan the layout of a layer's step."""
        self._planned = self._layers[layer].plan(observed)
        if self._name != STOCK:
            placed, costs = Placed(self._planned, self._geometry), self._costs
            ahead = costs.restore_bytes(placed, costs.way_of(placed))
            self._ahead_bytes = busiest_rank(ahead)

    def decide(self, counts_NE: Int64) -> None:
        """Decide on a microbatch of that step."""
        for mode, guard in self._guards.items():
            outcome = Outcome(guard.decide(counts_NE, self._planned))
            decision, moved_bytes = outcome.decision, self._ahead_bytes
            if decision.replanned:
                moved_bytes += busiest_rank(changed_traffic(guard, decision))
            tokens = int(counts_NE.sum()), int(outcome.totals.far_S.sum())
            layer_s = price(guard, outcome).layer_s
            self._cases[mode].append(
                (outcome.ratio, *tokens, decision.replanned, moved_bytes, layer_s)
            )

    def rows(self) -> Iterator[PlanRow]:
        for mode, cases in self._cases.items():
            by_number = np.array(cases, dtype=np.float64).T
            ratio, tokens, off_node, replanned, moved, layer_s = by_number
            yield PlanRow(
                strategy=self._name,
                mode=mode,
                capacity=self._geometry.capacity,
                cases=len(cases),
                mean=float(ratio.mean()),
                p99=float(np.percentile(ratio, 99)),
                off_node_share=float(off_node.sum() / tokens.sum()),
                replan_share=float(replanned.mean()),
                restored_bytes=float(moved.mean()),
                layer_ms=float(layer_s.mean()) * 1e3,
            )


def simulate(
    trace: Trace,
    priced: Mapping[Geometry, CostModel],
    strategies: Sequence[str],
    modes: Sequence[str],
    *,
    tolerance: float = 0.05,
    every: int = 1,
    iterations: range | None = None,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[PlanRow]:
    """Run all strategies and modes over a trace; `progress` wraps the cases, as tqdm does.

    Stock expert parallelism is the first row if E is a multiple of N. The geometries, each with
    its prices, differ in capacity alone. `every` is the stride over the cases; one that is coprime
    to the numbers of layers and microbatches samples all of them. Cases are those of `iterations`,
    from 1, if the trace has any there; layouts are of the counts of all earlier steps.
    """
    for geometry in priced:
        geometry.check_counts(trace.counts_RNE.shape[1:])
    cases = chosen_cases(trace, every, iterations)
    planners = [*_planners(priced, strategies, modes, tolerance)]
    wanted = set(cases)
    bar = iter(progress(cases))
    for (_, layer, records), observed in walk(trace):
        chosen = [record for record in records if record in wanted]
        if not chosen or observed is None:
            continue
        for planner in planners:
            planner.plan(layer, observed)
        for record in chosen:
            counts_NE = trace.counts_NE(record)
            next(bar)
            for planner in planners:
                planner.decide(counts_NE)
    # The bar closes when it is exhausted.
    next(bar, None)
    return [row for planner in planners for row in planner.rows()]


def chosen_cases(trace: Trace, every: int, iterations: range | None = None) -> list[int]:
    """Return the evaluated records in order; refuse a trace or stride that leaves none."""
    has_tokens_R = trace.counts_RNE.any(axis=(1, 2))
    if not has_tokens_R.any():
        raise ValueError("the trace holds no tokens; record a run that routes some")
    began: set[int] = set()
    cases: list[int] = []
    for of in layer_steps(trace):
        if of.layer in began:
            cases += [record for record in of.records if has_tokens_R[record]]
        began.add(of.layer)
    if not cases:
        raise ValueError(
            "no microbatch with tokens has an earlier step in its layer; the trace holds "
            f"{len(set(trace.step_R.tolist()))} step(s), so record at least 2"
        )
    if iterations is not None:
        cases = [record for record in cases if trace.step_R[record] + 1 in iterations] or cases
    if every > len(cases):
        raise ValueError(
            f"--every {every}: the trace has {len(cases)} case(s); give a number of at most that"
        )
    return cases[::every]


def _planners(
    priced: Mapping[Geometry, CostModel],
    strategies: Sequence[str],
    modes: Sequence[str],
    tolerance: float,
) -> Iterator[_Planner]:
    geometry, costs = next(iter(priced.items()))
    if geometry.num_experts % geometry.num_ranks == 0:
        capacity = geometry.num_experts // geometry.num_ranks
        stock = replace(geometry, capacity=capacity, sharding=Sharding.ROWS)
        costs = replace(costs, tokens=costs.tokens.of_stock)
        yield _Planner(STOCK, {"-": Guard(PlanMode.FORECAST, costs, stock, split=Split.EVEN)})
    for (geometry, costs), name in product(priced.items(), strategies):
        shape, split = geometry, Split.EXACT
        if lays_out_freely(name):
            # The paper's strategy assumes even splits, and leaves no expert at home.
            shape, split = replace(geometry, sharding=Sharding.ROWS), Split.EVEN
        guards = {}
        is_ahead = split == Split.EVEN or name == "static"
        for mode in [PlanMode.FORECAST.value] if is_ahead else modes:
            most = tolerance if mode == TOLERANCE else None
            of_mode = PlanMode.ADAPTIVE if mode == TOLERANCE else PlanMode(mode)
            guards[mode] = Guard(of_mode, costs, shape, most, split)
        yield _Planner(name, guards)
