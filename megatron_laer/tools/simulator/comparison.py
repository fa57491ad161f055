"""Comparison of strategies and modes on every microbatch of a trace: the rows of `plan`.

As in training, each layer's layout is planned once per step, from the counts of earlier steps.

Legend: N ranks, E experts, R records.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_laer.choices import PlanMode, Sharding, Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import Outcome, price
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.simulator.replay import (
    LayerPolicy,
    Observed,
    busiest_rank,
    changed_traffic,
    decide,
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
    """One strategy and mode over all cases; `plan_output.LEGEND` explains the columns.

    Cases are microbatches of one layer, with tokens and an earlier step. `fetched_bytes` are the
    part of `restored_bytes` that is fetched after the gate; both are means.
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
    plan_ms: float
    gate_ms: float
    restored_bytes: float
    fetched_bytes: float
    layer_ms: float
    time_over_bound: float


class _Case(NamedTuple):
    """Figures of one outcome, whose arrays would not fit in memory for all cases."""

    ratio: float
    load_over_bound: float
    tokens: int
    off_node: int
    layer_s: float
    bound_s: float
    replanned: bool
    fetched_bytes: int
    gate_s: float

    @classmethod
    def of(cls, guard: Guard, outcome: Outcome) -> _Case:
        decision, tokens_N, of = outcome.decision, outcome.tokens_N, price(guard, outcome)
        tokens = int(tokens_N.sum())
        least = -(-tokens // tokens_N.size)
        fetched = busiest_rank(changed_traffic(guard, decision)) if decision.replanned else 0
        return cls(
            ratio=outcome.ratio,
            load_over_bound=int(tokens_N.max()) / least,
            tokens=tokens,
            off_node=int(outcome.totals.far_S.sum()),
            layer_s=of.layer_s,
            bound_s=of.bound_s,
            replanned=decision.replanned,
            fetched_bytes=fetched,
            gate_s=outcome.decide_s,
        )


class _Planner:
    """Strategy (None for stock EP) with its layouts by layer, and the cases of each mode."""

    def __init__(
        self, name: str, strategy: Strategy | None, geometry: Geometry, guards: Mapping[str, Guard]
    ) -> None:
        self.name, self.geometry, self.guards = name, geometry, guards
        self.cases: dict[str, list[_Case]] = {mode: [] for mode in guards}
        self.plan_s: list[float] = []
        self.restored_bytes: list[int] = []
        self._layers: defaultdict[int, LayerPolicy] = defaultdict(
            lambda: LayerPolicy(strategy, geometry.static_layout, lays_out_freely(name))
        )

    def plan(self, layer: int, observed: Observed, costs: CostModel) -> ExpertLayout:
        policy = self._layers[layer]
        start_s = time.perf_counter()
        layout = policy.plan(observed)
        if policy.strategy is not None:
            self.plan_s.append(time.perf_counter() - start_s)
            self.restored_bytes.append(restored_bytes(Placed(layout, self.geometry), costs))
        return layout

    def rows(self) -> Iterator[PlanRow]:
        for mode in self.guards:
            yield self._row(mode)

    def _row(self, mode: str) -> PlanRow:
        cases = self.cases[mode]
        ratios = np.array([case.ratio for case in cases])
        fetched_bytes = float(np.mean([case.fetched_bytes for case in cases]))
        off_node = sum(case.off_node for case in cases)
        seconds = sum(case.layer_s for case in cases)
        return PlanRow(
            strategy=self.name,
            mode=mode,
            split=self.guards[mode].split,
            capacity=self.geometry.capacity,
            cases=len(cases),
            mean=float(ratios.mean()),
            p95=float(np.percentile(ratios, 95)),
            p99=float(np.percentile(ratios, 99)),
            max=float(ratios.max()),
            load_over_bound=float(np.mean([case.load_over_bound for case in cases])),
            off_node_share=off_node / sum(case.tokens for case in cases),
            replan_share=float(np.mean([case.replanned for case in cases])),
            plan_ms=float(np.median(self.plan_s or [0.0])) * 1e3,
            gate_ms=float(np.median([case.gate_s for case in cases])) * 1e3,
            restored_bytes=float(np.mean(self.restored_bytes or [0])) + fetched_bytes,
            fetched_bytes=fetched_bytes,
            layer_ms=seconds / len(cases) * 1e3,
            time_over_bound=seconds / sum(case.bound_s for case in cases),
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
        (planner, costs)
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
        layouts = [planner.plan(layer, observed, costs) for planner, costs in planners]
        for record in chosen:
            counts_NE = trace.counts_NE(record)
            next(bar)
            for (planner, _), layout in zip(planners, layouts, strict=True):
                for mode, guard in planner.guards.items():
                    outcome = decide(guard, counts_NE, layout)
                    planner.cases[mode].append(_Case.of(guard, outcome))
    # The bar closes when it is exhausted.
    next(bar, None)
    return [row for planner, _ in planners for row in planner.rows()]


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


def _stock(geometry: Geometry, costs: CostModel) -> Iterator[tuple[_Planner, CostModel]]:
    if geometry.num_experts % geometry.num_ranks == 0:
        capacity = geometry.num_experts // geometry.num_ranks
        stock = replace(geometry, capacity=capacity, sharding=Sharding.ROWS)
        by_rank = replace(costs, tokens=BY_RANK)
        guard = Guard(PlanMode.FORECAST, by_rank, stock, split=Split.EVEN)
        yield _Planner(STOCK, None, stock, {"-": guard}), by_rank


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
        yield _Planner(name, make_strategy(name, geometry=shape, costs=costs), shape, guards)


def _guard(
    mode: str, costs: CostModel, geometry: Geometry, split: Split, tolerance: float
) -> Guard:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if mode == TOLERANCE:
        return Guard(PlanMode.ADAPTIVE, costs, geometry, tolerance, split)
    return Guard(PlanMode(mode), costs, geometry, split=split)
