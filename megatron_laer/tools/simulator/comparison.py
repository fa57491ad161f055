"""Comparison of strategies and modes on every microbatch of a trace: the rows of `plan`.

As in training, each layer's layout is planned once per step, from the counts of earlier steps.

Legend: N ranks, E experts, R records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode, Sharding, Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.outcome import Outcome, price
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.simulator.replay import (
    LayerPolicy,
    Observed,
    busiest_rank,
    changed_traffic,
    layer_steps,
    restored_bytes,
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
    split: str
    capacity: int
    cases: int
    mean: float
    p95: float
    p99: float
    max: float
    load_over_bound: float
    off_node_share: float
    replan_share: float
    restored_bytes: float
    layer_ms: float
    time_over_bound: float


class _Planner:
    """Strategy, or stock EP, with its layouts by layer, and the cases of each mode."""

    def __init__(
        self, name: str, costs: CostModel, geometry: Geometry, guards: Mapping[str, Guard]
    ) -> None:
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
            placed = Placed(self._planned, self._geometry)
            self._ahead_bytes = restored_bytes(placed, self._costs)

    def decide(self, counts_NE: Int64) -> None:
        """Decide on a microbatch of that step."""
        for mode, guard in self._guards.items():
            outcome = Outcome(guard.decide(counts_NE, self._planned))
            decision, tokens_N, of = outcome.decision, outcome.tokens_N, price(guard, outcome)
            moved_bytes = self._ahead_bytes
            if decision.replanned:
                moved_bytes += busiest_rank(changed_traffic(guard, decision))
            least = -(-int(tokens_N.sum()) // tokens_N.size)
            self._cases[mode].append(
                (
                    *(outcome.ratio, int(tokens_N.max()) / least),
                    *(int(tokens_N.sum()), int(outcome.totals.far_S.sum())),
                    *(decision.replanned, moved_bytes, of.layer_s, of.bound_s),
                )
            )

    def rows(self) -> Iterator[PlanRow]:
        for mode, cases in self._cases.items():
            by_number = np.array(cases, dtype=np.float64).T
            ratio, over_bound, tokens, off_node, replanned, moved, layer_s, bound_s = by_number
            p95, p99 = np.percentile(ratio, [95, 99]).tolist()
            yield PlanRow(
                strategy=self._name,
                mode=mode,
                split=self._guards[mode].split,
                capacity=self._geometry.capacity,
                cases=len(cases),
                mean=float(ratio.mean()),
                p95=p95,
                p99=p99,
                max=float(ratio.max()),
                load_over_bound=float(over_bound.mean()),
                off_node_share=float(off_node.sum() / tokens.sum()),
                replan_share=float(replanned.mean()),
                restored_bytes=float(moved.mean()),
                layer_ms=float(layer_s.mean()) * 1e3,
                time_over_bound=float(layer_s.sum() / bound_s.sum()),
            )


def simulate(
    trace: Trace,
    priced: Mapping[Geometry, CostModel],
    strategies: Sequence[str],
    modes: Sequence[str],
    *,
    tolerance: float = 0.05,
    every: int = 1,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[PlanRow]:
    """Run all strategies and modes over a trace; `progress` wraps the cases, as tqdm does.

    Stock expert parallelism is the first row if E is a multiple of N. The geometries, each with
    its prices, differ in capacity alone. `every` is the stride over the cases; one that is coprime
    to the numbers of layers and microbatches samples all of them.
    """
    for geometry in priced:
        geometry.check_counts(trace.counts_RNE.shape[1:])
    cases = chosen_cases(trace, every)
    planners = [
        planner
        for geometry, costs in priced.items()
        for planner in _planners(geometry, costs, strategies, modes, tolerance)
    ]
    planners = [*_stock(*next(iter(priced.items()))), *planners]
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


def chosen_cases(trace: Trace, every: int) -> list[int]:
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
    if every > len(cases):
        raise ValueError(
            f"--every {every}: the trace has {len(cases)} case(s); give a number of at most that"
        )
    return cases[::every]


def _stock(geometry: Geometry, costs: CostModel) -> Iterator[_Planner]:
    if geometry.num_experts % geometry.num_ranks == 0:
        capacity = geometry.num_experts // geometry.num_ranks
        stock = replace(geometry, capacity=capacity, sharding=Sharding.ROWS)
        by_rank = replace(costs, tokens=BY_RANK)
        guard = Guard(PlanMode.FORECAST, by_rank, stock, split=Split.EVEN)
        yield _Planner(STOCK, by_rank, stock, {"-": guard})


def _planners(
    geometry: Geometry,
    costs: CostModel,
    strategies: Sequence[str],
    modes: Sequence[str],
    tolerance: float,
) -> Iterator[_Planner]:
    for name in strategies:
        shape, split = geometry, Split.EXACT
        is_papers = lays_out_freely(name)
        if is_papers:
            # The paper's strategy assumes even splits, and leaves no expert at home.
            shape, split = replace(geometry, sharding=Sharding.ROWS), Split.EVEN
        guards = {
            mode: _guard(mode, costs, shape, split, tolerance)
            for mode in ([PlanMode.FORECAST.value] if is_papers or name == "static" else modes)
        }
        yield _Planner(name, costs, shape, guards)


def _guard(
    mode: str, costs: CostModel, geometry: Geometry, split: Split, tolerance: float
) -> Guard:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if mode == TOLERANCE:
        return Guard(PlanMode.ADAPTIVE, costs, geometry, tolerance, split)
    return Guard(PlanMode(mode), costs, geometry, split=split)
