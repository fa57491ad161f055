"""The table runs each microbatch of a trace under each strategy.

As in training, a layer's layout of a step is planned from the counts of the steps before it, once,
and serves all microbatches of the step; the layout of the step before is the planner's `current`.

Legend: N ranks, E experts, R records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.config import PlanMode, Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools.simulator.outcome import Outcome, evaluate, restored_bytes

STOCK = "stock EP"

# `adaptive` by cost, and by a tolerance.
TOLERANCE = "tolerance"
MODES = (*(mode.value for mode in GUARD_MODES), TOLERANCE)

# Shown as they are; a layout made after the gate would hide what they do.
BASELINES = ("static", "laer")


@dataclass(frozen=True)
class Row:
    """Holds a line of the table: one strategy and mode over all cases.

    Attributes:
        split: how tokens are split over replicas.
        cases: microbatches, of a layer each, that have a step before them and any token.
        mean, p95, p99, max: of max/mean tokens per rank.
        load_over_bound: mean of largest load / ceil(tokens / N).
        off_node_share, off_node_tokens: tokens that leave their node, of all and per case.
        replan_share: cases whose layout was made after the gate.
        plan_ms: measured time of a planned layout, in the background, median.
        gate_ms: measured time after the gate, on the critical path: split and guard, median.
        restored_bytes: that the busiest rank receives for one forward pass, mean.
        fetched_bytes: what of that is fetched after the gate, mean.
        layer_ms: mean predicted time of a layer, forward and backward, with what layouts that are
            made after the gate cost; other restores are taken to be hidden.
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
    replan_share: float
    plan_ms: float
    gate_ms: float
    restored_bytes: float
    fetched_bytes: float
    layer_ms: float
    time_over_bound: float
    ratios_R: tuple[float, ...] = field(repr=False)


@dataclass
class _Entry:
    """Collects what a line of the table is made from."""

    strategy: str
    mode: str
    guard: Guard
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass
class _Planner:
    """Keeps a strategy at work, with the layouts in force by layer, and its lines.

    Without a strategy it is stock: `ExpertLayout.static` at C = E/N, and nothing is restored.
    """

    strategy: Strategy | None
    geometry: Geometry
    entries: list[_Entry]
    layouts: dict[int, ExpertLayout] = field(default_factory=dict)
    plan_s: list[float] = field(default_factory=list)
    restored_bytes: list[int] = field(default_factory=list)

    def layout(self, layer: int, forecast_NE: Int64, costs: CostModel) -> ExpertLayout:
        """Return the next layout of a layer."""
        geometry = self.geometry
        current = self.layouts.get(layer) or ExpertLayout.static(
            geometry.num_ranks, geometry.capacity, geometry.num_experts
        )
        if self.strategy is not None:
            start_s = time.perf_counter()
            current = self.strategy.plan(forecast_NE, current)
            self.plan_s.append(time.perf_counter() - start_s)
            self.restored_bytes.append(restored_bytes(current, geometry.node_size, costs))
        self.layouts[layer] = current
        return current


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
) -> list[Row]:
    """Run all strategies and modes over a trace of the geometries' ranks and experts.

    `BASELINES` are always in mode `forecast`. Stock expert parallelism is the first row, where E
    is a multiple of N.

    Args:
        geometries: one per capacity; N, E and node size are the same in all.
        modes: of `MODES`; `tolerance` is `adaptive` with `tolerance`.
        lag: a layout is planned from counts that are this many recorded steps old, or older.
        every: evaluate each so many-th case; a number that divides neither the layers nor the
            microbatches meets them all.
        progress: wraps the cases, as tqdm does.

    Raises:
        ValueError: a trace of other sizes, an unknown name, or one that has no cases.
    """
    for geometry in geometries:
        geometry.check_counts(trace.counts_RNE.shape[1:])
    cases = chosen_cases(trace, lag, every)
    planners = list(_planners(geometries, costs, strategies, modes, tolerance))
    wanted = set(cases)
    bar = iter(progress(cases))
    for step_records, forecast_NE in _walk(trace, lag):
        chosen = [record for record in step_records if record in wanted]
        if not chosen or forecast_NE is None:
            continue
        layer = int(trace.layer_R[chosen[0]])
        planned = [planner.layout(layer, forecast_NE, costs) for planner in planners]
        for record in chosen:
            counts_NE = trace.counts_NE(record)
            next(bar)
            for planner, layout in zip(planners, planned, strict=True):
                for entry in planner.entries:
                    entry.outcomes.append(evaluate(entry.guard, counts_NE, layout))
    # The bar closes when it is exhausted.
    next(bar, None)
    return [_row(entry, planner) for planner in planners for entry in planner.entries]


def split_of(strategy: str) -> Split:
    """Return the split that a strategy reckons with, and is shown with: the paper's is even."""
    return Split.EVEN if strategy == "laer" else Split.EXACT


def chosen_cases(trace: Trace, lag: int, every: int) -> list[int]:
    """Return the records that are evaluated, in order.

    Raises:
        ValueError: a lag or a stride that leaves none, or only the first one.
    """
    if lag < 1 or every < 1:
        raise ValueError(f"lag and every must be at least 1, got {lag} and {every}")
    if not trace.counts_RNE.any():
        raise ValueError("the trace holds no tokens; record a run that routes some")
    steps = len(set(trace.step_R.tolist()))
    cases = _cases(trace, lag)
    if not cases:
        raise ValueError(
            f"--lag {lag}: no microbatch with tokens has a record {lag} step(s) before it in its "
            f"layer; the trace holds {steps} step(s), so record at least {lag + 1}, or give a "
            "smaller lag"
        )
    if every > len(cases):
        raise ValueError(
            f"--every {every}: the trace has {len(cases)} case(s); give a number of at most that"
        )
    return cases[::every]


def mean_tokens(trace: Trace, top_k: int) -> int:
    """Return the mean tokens of a rank and microbatch, each of so many experts; at least one."""
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
        each = first.num_experts // first.num_ranks
        stock = Geometry(first.num_ranks, first.num_experts, each, first.node_size)
        by_rank = replace(costs, tokens=BY_RANK)
        guard = Guard(PlanMode.FORECAST, by_rank, stock, split=Split.EVEN)
        yield _Planner(None, stock, [_Entry(STOCK, "-", guard)])
    for geometry in geometries:
        for name in strategies:
            split = split_of(name)
            entries = [
                _Entry(name, mode, _guard(mode, costs, geometry, split, tolerance))
                for mode in ([PlanMode.FORECAST.value] if name in BASELINES else modes)
            ]
            yield _Planner(make_strategy(name, geometry=geometry, costs=costs), geometry, entries)


def _guard(
    mode: str, costs: CostModel, geometry: Geometry, split: Split, tolerance: float
) -> Guard:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if mode == TOLERANCE:
        return Guard(PlanMode.ADAPTIVE, costs, geometry, tolerance, split)
    return Guard(PlanMode(mode), costs, geometry, split=split)


def _walk(trace: Trace, lag: int) -> Iterator[tuple[list[int], Int64 | None]]:
    """Yield records by step and layer, in order, with the forecast that was there for them."""
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
    """Return the records with any token and with `lag` steps of their layer before them."""
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


def _row(entry: _Entry, planner: _Planner) -> Row:
    outcomes = entry.outcomes
    ratios = np.array([outcome.max_over_mean for outcome in outcomes])
    fetched_bytes = float(np.mean([outcome.fetched_bytes for outcome in outcomes]))
    tokens = sum(outcome.tokens for outcome in outcomes)
    off_node = sum(outcome.off_node_tokens for outcome in outcomes)
    seconds = sum(outcome.layer_s for outcome in outcomes)
    return Row(
        strategy=entry.strategy,
        mode=entry.mode,
        split=entry.guard.split,
        capacity=planner.geometry.capacity,
        cases=len(outcomes),
        mean=float(ratios.mean()),
        p95=float(np.percentile(ratios, 95)),
        p99=float(np.percentile(ratios, 99)),
        max=float(ratios.max()),
        load_over_bound=float(np.mean([outcome.load_over_bound for outcome in outcomes])),
        off_node_share=off_node / tokens,
        off_node_tokens=off_node / len(outcomes),
        replan_share=float(np.mean([outcome.replanned for outcome in outcomes])),
        plan_ms=float(np.median(planner.plan_s or [0.0])) * 1e3,
        gate_ms=float(np.median([outcome.gate_s for outcome in outcomes])) * 1e3,
        restored_bytes=float(np.mean(planner.restored_bytes or [0])) + fetched_bytes,
        fetched_bytes=fetched_bytes,
        layer_ms=seconds / len(outcomes) * 1e3,
        time_over_bound=seconds / sum(outcome.least_s for outcome in outcomes),
        ratios_R=tuple(ratios.tolist()),
    )
