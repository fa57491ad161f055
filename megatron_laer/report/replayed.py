"""A trace without metrics becomes a `RunData` here: it is run through the code that trains.

Planned and decided as by the default strategy and plan mode; times are predicted. Long traces are
thinned out evenly, and the page says so.

Legend: T steps, L MoE layers, N ranks, E experts, R records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.config import FSEPConfig, PlanMode
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.prediction import Prediction, predict
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.report.recorded import stock_tokens_TLN
from megatron_laer.report.run_data import Float64, RunData, expert_tokens_TLE
from megatron_laer.simulator.estimate import Work
from megatron_laer.telemetry.metrics_file import Shape
from megatron_laer.trace import Trace

# Decisions take about a millisecond each.
MOST_CASES = 20_000
STRATEGY, MODE = FSEPConfig().planner, PlanMode.ADAPTIVE


@dataclass
class _Cell:
    """Collects one layer's microbatches of one step."""

    tokens_N: Int64
    ratios: list[float] = field(default_factory=list)
    stock_ratios: list[float] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    gains_s: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)
    fresh: int = 0
    changed_slots: int = 0
    largest_tokens: int = 0
    least_tokens: int = 0


def replayed_run(
    name: str,
    trace: Trace,
    geometry: Geometry,
    costs: CostModel,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> RunData:
    """Replay a trace.

    Args:
        name: of the trace, as the user gave it.
        progress: wraps the steps, as tqdm does.

    Raises:
        ValueError: a trace of other sizes, or without tokens.
    """
    geometry.check_counts(trace.counts_RNE.shape[1:])
    if not trace.counts_RNE.any():
        raise ValueError(f"trace {name!r} holds no tokens; record a run that routes some")
    num_layers = len(trace.layers)
    groups = list(_by_step_and_layer(trace))
    all_steps = sorted({step for step, _, _ in groups})
    stride = _stride(trace, len(all_steps))
    steps = all_steps[::stride]
    at = {step: index for index, step in enumerate(steps)}
    shape = (len(steps), num_layers)
    cells: dict[tuple[int, int], _Cell] = {}
    layouts: dict[int, ExpertLayout] = {}
    planned: dict[int, list[ExpertLayout]] = {}
    forecasts: dict[int, SmoothedForecast] = {}
    strategy = make_strategy(STRATEGY, geometry=geometry, costs=costs)
    guard = Guard(MODE, costs, geometry)
    static = ExpertLayout.static(geometry.num_ranks, geometry.capacity, geometry.num_experts)
    for step, layer, records in progress(groups):
        forecast = forecasts.get(layer, SmoothedForecast())
        if step in at:
            layout = layouts.get(layer, static)
            if layer in forecasts:
                layout = strategy.plan(forecast.counts_NE(), layout)
            layouts[layer] = layout
            planned.setdefault(step, [static] * num_layers)[layer] = layout
            cells[at[step], layer] = _decided(guard, layout, [trace.counts_NE(r) for r in records])
        total_NE = trace.counts_RNE[records].sum(axis=0, dtype=np.int64)
        forecasts[layer] = forecast.observe(total_NE)

    def grid(value: Callable[[_Cell], float]) -> Float64:
        values_TL = np.full(shape, np.nan)
        for place, cell in cells.items():
            values_TL[place] = value(cell)
        return values_TL

    tokens_TLN = np.zeros((*shape, geometry.num_ranks), dtype=np.int64)
    for place, cell in cells.items():
        tokens_TLN[place] = cell.tokens_N
    steps_T = np.array(steps, dtype=np.int64)
    experts_TLE = expert_tokens_TLE(
        trace.step_R, trace.layer_R, trace.counts_RNE, steps_T, num_layers
    )
    of = Shape(
        geometry.num_ranks,
        geometry.num_experts,
        geometry.capacity,
        geometry.node_size,
        tuple(f"layer {name}" if name.isdigit() else name for name in trace.layers),
    )
    of_layers = {
        "passes": grid(lambda cell: len(cell.ratios)),
        "fresh": grid(lambda cell: cell.fresh),
        "changed_slots": grid(lambda cell: cell.changed_slots),
        "largest_tokens": grid(lambda cell: cell.largest_tokens),
        "least_tokens": grid(lambda cell: cell.least_tokens),
        "gain_ms": grid(lambda cell: _mean(cell.gains_s) * 1e3),
        "cost_ms": grid(lambda cell: _mean(cell.costs_s) * 1e3),
    }
    for metric, attribute in _PREDICTED:
        of_layers[metric] = grid(_predicted_ms(attribute))
    return RunData(
        name=name,
        shape=of,
        is_measured=False,
        steps_T=steps_T,
        imbalance_TL=grid(lambda cell: _mean(cell.ratios)),
        stock_TL=grid(lambda cell: _mean(cell.stock_ratios)),
        layer_ms_TL=of_layers["predicted_ms"] * of_layers["passes"],
        of_steps={},
        of_layers=of_layers,
        metrics={},
        rank_tokens_TLN=tokens_TLN,
        stock_rank_tokens_TLN=stock_tokens_TLN(experts_TLE, of),
        experts_TLE=experts_TLE,
        layouts=[(step, planned[step]) for step in steps],
        settings=_settings(of, costs),
        notes=_notes(stride, len(all_steps)),
    )


def replay_work(trace: Trace, geometry: Geometry) -> Work:
    """Return what a replay has to go through."""
    num_steps = len(set(trace.step_R.tolist()))
    stride = _stride(trace, num_steps)
    return Work(
        geometries=[geometry],
        strategies=[STRATEGY],
        modes=[MODE],
        records=len(trace),
        layers=len(trace.layers),
        plans=-(-num_steps // stride) * len(trace.layers),
        cases=-(-len(trace) // stride),
        lag=1,
    )


def _stride(trace: Trace, num_steps: int) -> int:
    """Return every how many steps one is shown."""
    per_step = -(-len(trace) // num_steps)
    return max(1, -(-per_step * num_steps // MOST_CASES))


_PREDICTED = (
    ("predicted_ms", "layer_s"),
    ("stock_ms", "stock_s"),
    ("balanced_ms", "balanced_s"),
    ("bound_ms", "bound_s"),
)


def _predicted_ms(attribute: str) -> Callable[[_Cell], float]:
    return lambda cell: _mean([getattr(p, attribute) for p in cell.predictions]) * 1e3


def _by_step_and_layer(trace: Trace) -> Iterator[tuple[int, int, list[int]]]:
    """Yield the records of each step and layer, in order."""
    keys = list(zip(trace.step_R.tolist(), trace.layer_R.tolist(), strict=True))
    begin = 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[end] != keys[begin]:
            yield *keys[begin], list(range(begin, end))
            begin = end


def _decided(guard: Guard, layout: ExpertLayout, microbatches: Sequence[Int64]) -> _Cell:
    cell = _Cell(np.zeros(guard.geometry.num_ranks, dtype=np.int64))
    for counts_NE in microbatches:
        decision = guard.decide(counts_NE, layout)
        tokens_N = fsep_tokens_N(decision.quotas)
        cell.tokens_N = cell.tokens_N + tokens_N
        cell.ratios.append(max_over_mean(tokens_N))
        cell.stock_ratios.append(max_over_mean(stock_tokens_N(counts_NE)))
        cell.predictions.append(predict(guard, decision))
        if decision.gain_s is not None and decision.cost_s is not None:
            cell.gains_s.append(decision.gain_s)
            cell.costs_s.append(decision.cost_s)
        if decision.replanned:
            cell.fresh += 1
            cell.changed_slots += decision.changed_slots
        largest = int(tokens_N.max())
        if largest >= cell.largest_tokens:
            cell.largest_tokens = largest
            cell.least_tokens = -(-int(tokens_N.sum()) // tokens_N.size)
    return cell


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _settings(shape: Shape, costs: CostModel) -> list[tuple[str, str]]:
    return [
        ("ranks N", str(shape.num_ranks)),
        ("ranks per node G", str(shape.node_size)),
        ("experts E", str(shape.num_experts)),
        ("slots per rank C", str(shape.capacity)),
        ("MoE layers", str(len(shape.layers))),
        ("planner", STRATEGY),
        ("plan_mode", MODE.value),
        ("cluster", costs.cluster.name),
        ("hidden", str(costs.hidden)),
        ("ffn", str(costs.ffn)),
        ("gated", str(costs.gated)),
        ("bytes_per_element", str(costs.bytes_per_element)),
    ]


def _notes(stride: int, num_steps: int) -> list[str]:
    notes = [
        "Only routing was recorded: layouts and decisions are those that the planner and the guard "
        "would have made of it, and times are predicted, of MoE layers alone."
    ]
    if stride > 1:
        notes.append(f"Of {num_steps} recorded steps every {stride}th is shown.")
    return notes
