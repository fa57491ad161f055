"""Comparison of strategies and modes on every microbatch of a trace: the rows of `plan`.

As in training, each layer's layout is planned once per step, from the counts of earlier steps.

Legend: N ranks, E experts, R records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.config import PlanMode, Split, lays_out_freely
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.tools.simulator.node_rows import by_cause
from megatron_laer.tools.simulator.replay import Outcome, evaluate, restored_bytes, walk
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

    Cases are microbatches of one layer, with tokens and enough earlier steps. `fetched_bytes` are
    the part of `restored_bytes` that is fetched after the gate; both are means. `node_rows` are
    between nodes per pair, by cause.
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
    off_node_tokens: float
    node_rows: Mapping[str, float]
    replan_share: float
    plan_ms: float
    gate_ms: float
    restored_bytes: float
    fetched_bytes: float
    layer_ms: float
    time_over_bound: float
    ratios_R: tuple[float, ...] = field(repr=False)


@dataclass
class _Planner:
    """Strategy (None for stock EP) with its layouts by layer, and each mode's outcomes."""

    name: str
    strategy: Strategy | None
    geometry: Geometry
    guards: dict[str, Guard]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    layouts: dict[int, ExpertLayout] = field(default_factory=dict)
    plan_s: list[float] = field(default_factory=list)
    restored_bytes: list[int] = field(default_factory=list)

    def plan(self, layer: int, forecast_NE: Int64, costs: CostModel) -> None:
        current = self.layouts.get(layer) or self.geometry.static_layout
        if self.strategy is not None:
            start_s = time.perf_counter()
            current = self.strategy.plan(forecast_NE, current)
            self.plan_s.append(time.perf_counter() - start_s)
            self.restored_bytes.append(restored_bytes(Placed(current, self.geometry), costs))
        self.layouts[layer] = current

    def decide(self, layer: int, counts_NE: Int64) -> None:
        for mode, guard in self.guards.items():
            outcome = evaluate(guard, counts_NE, self.layouts[layer])
            self.outcomes.setdefault(mode, []).append(outcome)

    def rows(self) -> Iterator[PlanRow]:
        for mode, outcomes in self.outcomes.items():
            yield _row(self, mode, outcomes)


def simulate(
    trace: Trace,
    geometries: Sequence[Geometry],
    costs: CostModel,
    strategies: Sequence[str],
    modes: Sequence[str],
    *,
    tolerance: float = 0.05,
    lag: int = 1,
    every: int = 1,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[PlanRow]:
    """Run all strategies and modes over a trace; `progress` wraps the cases, as tqdm does.

    Stock expert parallelism is the first row if E is a multiple of N. `geometries` differ in
    capacity alone. `lag` is the age of the newest counts behind a layout, in recorded steps.
    `every` is the stride over the cases; one that is coprime to the numbers of layers and
    microbatches samples all of them.
    """
    for geometry in geometries:
        geometry.check_counts(trace.counts_RNE.shape[1:])
    cases = chosen_cases(trace, lag, every)
    planners = list(_planners(geometries, costs, strategies, modes, tolerance))
    wanted = set(cases)
    bar = iter(progress(cases))

    def total_NE(records: Sequence[int]) -> Int64:
        summed: Int64 = trace.counts_RNE[records[0] : records[-1] + 1].sum(axis=0, dtype=np.int64)
        return summed

    for _, layer, records, forecast in walk(trace, lag, total_NE):
        chosen = [record for record in records if record in wanted]
        if not chosen or forecast is None:
            continue
        for planner in planners:
            planner.plan(layer, forecast.counts_NE(), costs)
        for record in chosen:
            counts_NE = trace.counts_NE(record)
            next(bar)
            for planner in planners:
                planner.decide(layer, counts_NE)
    # The bar closes when it is exhausted.
    next(bar, None)
    return [row for planner in planners for row in planner.rows()]


def chosen_cases(trace: Trace, lag: int, every: int) -> list[int]:
    """Return the evaluated records in order; refuse a lag or stride that leaves none."""
    if lag < 1 or every < 1:
        raise ValueError(f"lag and every must be at least 1, got {lag} and {every}")
    if not trace.counts_RNE.any():
        raise ValueError("the trace holds no tokens; record a run that routes some")
    cases = _cases(trace, lag)
    if not cases:
        raise ValueError(
            f"--lag {lag}: no microbatch with tokens has a record {lag} step(s) before it in its "
            f"layer; the trace holds {len(set(trace.step_R.tolist()))} step(s), so record at "
            f"least {lag + 1}, or give a smaller lag"
        )
    if every > len(cases):
        raise ValueError(
            f"--every {every}: the trace has {len(cases)} case(s); give a number of at most that"
        )
    return cases[::every]


def mean_tokens(trace: Trace, top_k: int) -> int:
    pairs = int(trace.counts_RNE.sum(dtype=np.int64))
    return max(1, pairs // (len(trace) * trace.num_ranks * top_k))


def _planners(
    geometries: Sequence[Geometry],
    costs: CostModel,
    strategies: Sequence[str],
    modes: Sequence[str],
    tolerance: float,
) -> Iterator[_Planner]:
    first = geometries[0]
    if first.num_experts % first.num_ranks == 0:
        capacity = first.num_experts // first.num_ranks
        stock = replace(first, capacity=capacity, sharding=Sharding.ROWS)
        by_rank = replace(costs, tokens=BY_RANK)
        guard = Guard(PlanMode.FORECAST, by_rank, stock, split=Split.EVEN)
        yield _Planner(STOCK, None, stock, {"-": guard})
    for geometry in geometries:
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
            strategy = make_strategy(name, geometry=shape, costs=costs)
            yield _Planner(name, strategy, shape, guards)


def _guard(
    mode: str, costs: CostModel, geometry: Geometry, split: Split, tolerance: float
) -> Guard:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if mode == TOLERANCE:
        return Guard(PlanMode.ADAPTIVE, costs, geometry, tolerance, split)
    return Guard(PlanMode(mode), costs, geometry, split=split)


def _cases(trace: Trace, lag: int) -> list[int]:
    has_tokens_R = trace.counts_RNE.any(axis=(1, 2))
    steps_of: dict[int, set[int]] = {}
    cases = []
    keys = zip(trace.step_R.tolist(), trace.layer_R.tolist(), strict=True)
    for record, (step, layer) in enumerate(keys):
        seen = steps_of.setdefault(layer, set())
        seen.add(step)
        if len(seen) > lag and has_tokens_R[record]:
            cases.append(record)
    return cases


def _row(planner: _Planner, mode: str, outcomes: Sequence[Outcome]) -> PlanRow:
    ratios = np.array([outcome.max_over_mean for outcome in outcomes])
    fetched_bytes = float(np.mean([outcome.fetched_bytes for outcome in outcomes]))
    off_node = sum(outcome.node_rows.off_node for outcome in outcomes)
    seconds = sum(outcome.layer_s for outcome in outcomes)
    return PlanRow(
        strategy=planner.name,
        mode=mode,
        split=planner.guards[mode].split,
        capacity=planner.geometry.capacity,
        cases=len(outcomes),
        mean=float(ratios.mean()),
        p95=float(np.percentile(ratios, 95)),
        p99=float(np.percentile(ratios, 99)),
        max=float(ratios.max()),
        load_over_bound=float(np.mean([outcome.load_over_bound for outcome in outcomes])),
        off_node_share=off_node / sum(outcome.tokens for outcome in outcomes),
        off_node_tokens=off_node / len(outcomes),
        node_rows=by_cause(outcome.node_rows for outcome in outcomes),
        replan_share=float(np.mean([outcome.replanned for outcome in outcomes])),
        plan_ms=float(np.median(planner.plan_s or [0.0])) * 1e3,
        gate_ms=float(np.median([outcome.gate_s for outcome in outcomes])) * 1e3,
        restored_bytes=float(np.mean(planner.restored_bytes or [0])) + fetched_bytes,
        fetched_bytes=fetched_bytes,
        layer_ms=seconds / len(outcomes) * 1e3,
        time_over_bound=seconds / sum(outcome.least_s for outcome in outcomes),
        ratios_R=tuple(ratios.tolist()),
    )
