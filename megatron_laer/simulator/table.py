"""The table of strategies over a trace: each microbatch of the trace under each of them.

As in training, a layer's layout of a step is planned from the counts of the steps before it, once,
and serves all microbatches of the step; the layout of the step before is the planner's `current`.

Shape suffixes: N ranks, E experts, R records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_laer.config import EVEN_SPLIT, EXACT_SPLIT
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.quotas import Int64
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.simulator.modes import Decision, Mode, keep_forecast, mode_by_name
from megatron_laer.simulator.outcome import Outcome, evaluate
from megatron_laer.trace.records import Trace

STOCK = "stock EP"

# The paper's planner reckons with even splits, and is shown with them.
_SPLITS = {"laer": EVEN_SPLIT}


@dataclass(frozen=True)
class Row:
    """A line of the table: one strategy and mode over all cases.

    Attributes:
        split: how tokens are split over replicas.
        cases: microbatches, of a layer each, that have a step before them and any token.
        mean, p95, p99, max: of max/mean tokens per rank.
        load_over_bound: mean of largest load / ceil(tokens / N).
        off_node_share, off_node_tokens: tokens that leave their node, of all and per case.
        plan_ms: mean time of a layout, in the background or (mode `exact`) after the gate.
        restored_bytes: that the busiest rank receives for one forward pass, mean.
        fresh_share: cases in which slots were restored after the gate.
        layer_ms: mean predicted time of a layer, forward and backward; restores not included.
        time_over_bound: sum of predicted times / sum of their lower bounds.
        ratios_R: max/mean of each case, for plots.
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
    plan_ms: float
    restored_bytes: float
    fresh_share: float
    layer_ms: float
    time_over_bound: float
    ratios_R: tuple[float, ...] = field(repr=False)


@dataclass
class _Entry:
    """A line in the making."""

    strategy: str
    mode: str
    split: str
    geometry: Geometry
    decide: Mode
    restored_slots: int
    outcomes: list[Outcome] = field(default_factory=list)
    decisions: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class _Planner:
    """A strategy at work, with the layouts in force by layer, and its lines."""

    strategy: Strategy | None
    geometry: Geometry
    entries: list[_Entry]
    layouts: dict[int, ExpertLayout] = field(default_factory=dict)
    plan_s: list[float] = field(default_factory=list)

    def layout(self, layer: int, forecast_NE: Int64) -> ExpertLayout:
        """The next layout of a layer."""
        geometry = self.geometry
        current = self.layouts.get(layer) or ExpertLayout.static(
            geometry.num_ranks, geometry.capacity, geometry.num_experts
        )
        if self.strategy is not None:
            start_s = time.perf_counter()
            current = self.strategy.plan(forecast_NE, current)
            self.plan_s.append(time.perf_counter() - start_s)
        self.layouts[layer] = current
        return current


def simulate(
    trace: Trace,
    geometries: Sequence[Geometry],
    costs: CostModel,
    strategies: Sequence[str],
    modes: Sequence[str],
    *,
    expert_bytes: int,
    lag: int = 1,
    every: int = 1,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Row]:
    """Run all strategies and modes over a trace of the geometries' ranks and experts.

    Modes other than `forecast` are for exact splits, so `laer` has none of them. Stock expert
    parallelism is the first row, where E is a multiple of N.

    Args:
        geometries: one per capacity; N, E and node size are the same in all.
        expert_bytes: of one expert's weights.
        lag: a layout is planned from counts that are this many recorded steps old, or older.
        every: evaluate each so many-th case; a number that divides neither the layers nor the
            microbatches meets them all.
        progress: wraps the cases, as tqdm does.

    Raises:
        ValueError: a trace of other sizes, an unknown name, or one that has no cases.
    """
    for geometry in geometries:
        geometry.check_counts(trace.counts_RNE.shape[1:])
    if lag < 1 or every < 1:
        raise ValueError(f"lag and every must be at least 1, got {lag} and {every}")
    planners = list(_planners(geometries, costs, strategies, modes))
    cases = _cases(trace, lag)[::every]
    if not cases:
        raise ValueError(
            f"no microbatch has a record {lag} step(s) before it in its layer: the trace holds "
            f"steps {sorted(set(trace.step_R.tolist()))[:8]}; record at least {lag + 1} steps"
        )
    wanted = set(cases)
    bar = iter(progress(cases))
    for step_records, forecast_NE in _walk(trace, lag):
        chosen = [record for record in step_records if record in wanted]
        if not chosen or forecast_NE is None:
            continue
        layer = int(trace.layer_R[chosen[0]])
        planned = [planner.layout(layer, forecast_NE) for planner in planners]
        for record in chosen:
            counts_NE = trace.counts_NE(record)
            next(bar)
            for planner, layout in zip(planners, planned, strict=True):
                for entry in planner.entries:
                    _evaluate(entry, counts_NE, layout, costs)
    # The bar closes when it is exhausted.
    next(bar, None)
    return [_row(entry, planner, expert_bytes) for planner in planners for entry in planner.entries]


def _planners(
    geometries: Sequence[Geometry],
    costs: CostModel,
    strategies: Sequence[str],
    modes: Sequence[str],
) -> Iterator[_Planner]:
    first = geometries[0]
    if first.num_experts % first.num_ranks == 0:
        each = first.num_experts // first.num_ranks
        stock = Geometry(first.num_ranks, first.num_experts, each, first.node_size)
        entry = _Entry(STOCK, "-", EVEN_SPLIT, stock, keep_forecast, restored_slots=0)
        yield _Planner(None, stock, [entry])
    for geometry in geometries:
        for name in strategies:
            split = _SPLITS.get(name, EXACT_SPLIT)
            entries = [
                _Entry(name, mode, split, geometry, mode_by_name(mode), geometry.capacity)
                for mode in (modes if split == EXACT_SPLIT else ["forecast"])
            ]
            yield _Planner(make_strategy(name, geometry=geometry, costs=costs), geometry, entries)


def _walk(trace: Trace, lag: int) -> Iterator[tuple[list[int], Int64 | None]]:
    """Records by step and layer, in order, with the forecast that was there for them."""
    states: dict[int, deque[SmoothedForecast]] = {}
    keys = list(zip(trace.step_R.tolist(), trace.layer_R.tolist(), strict=True))
    begin = 0
    for end in range(1, len(keys) + 1):
        if end < len(keys) and keys[end] == keys[begin]:
            continue
        records, layer = list(range(begin, end)), keys[begin][1]
        # Oldest first; the newest one that may be used is `lag` steps old.
        known = states.setdefault(layer, deque(maxlen=lag))
        yield records, known[0].counts_NE() if len(known) == lag else None
        total_NE = trace.counts_RNE[begin:end].sum(axis=0, dtype=np.int64)
        known.append((known[-1] if known else SmoothedForecast()).observe(total_NE))
        begin = end


def _cases(trace: Trace, lag: int) -> list[int]:
    """Records with at least one token and `lag` steps of their layer before them."""
    has_tokens_R = trace.counts_RNE.any(axis=(1, 2))
    steps_before: dict[int, set[int]] = {}
    cases = []
    for record, (step, layer) in enumerate(
        zip(trace.step_R.tolist(), trace.layer_R.tolist(), strict=True)
    ):
        seen = steps_before.setdefault(layer, set())
        seen.add(step)
        if len(seen) > lag and has_tokens_R[record]:
            cases.append(record)
    return cases


def _evaluate(entry: _Entry, counts_NE: Int64, planned: ExpertLayout, costs: CostModel) -> None:
    node_size = entry.geometry.node_size
    decision: Decision = entry.decide(counts_NE, planned, node_size)
    entry.outcomes.append(evaluate(counts_NE, decision.layout, node_size, entry.split, costs))
    entry.decisions.append((decision.fetched_slots, decision.plan_s))


def _row(entry: _Entry, planner: _Planner, expert_bytes: int) -> Row:
    outcomes = entry.outcomes
    ratios = np.array([outcome.max_over_mean for outcome in outcomes])
    fetched_R, decided_s_R = np.array(entry.decisions).T
    # A mode that makes a layout after the gate has that on its line, the others the plan's time.
    plan_s = decided_s_R.mean() if decided_s_R.any() else np.mean(planner.plan_s or [0.0])
    num_ranks = entry.geometry.num_ranks
    slot_bytes = expert_bytes * (num_ranks - 1) / num_ranks
    tokens = sum(outcome.tokens for outcome in outcomes)
    off_node = sum(outcome.off_node_tokens for outcome in outcomes)
    seconds = sum(outcome.layer_s for outcome in outcomes)
    return Row(
        strategy=entry.strategy,
        mode=entry.mode,
        split=entry.split,
        capacity=entry.geometry.capacity,
        cases=len(outcomes),
        mean=float(ratios.mean()),
        p95=float(np.percentile(ratios, 95)),
        p99=float(np.percentile(ratios, 99)),
        max=float(ratios.max()),
        load_over_bound=float(np.mean([outcome.load_over_bound for outcome in outcomes])),
        off_node_share=off_node / tokens,
        off_node_tokens=off_node / len(outcomes),
        plan_ms=float(plan_s) * 1e3,
        restored_bytes=float((entry.restored_slots + fetched_R).mean() * slot_bytes),
        fresh_share=float((fetched_R > 0).mean()),
        layer_ms=seconds / len(outcomes) * 1e3,
        time_over_bound=seconds / sum(outcome.least_s for outcome in outcomes),
        ratios_R=tuple(ratios.tolist()),
    )
