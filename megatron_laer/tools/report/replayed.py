"""A `RunData` from a trace without metrics, replayed through the code of training.

Layouts and decisions are those of the default strategy and plan mode; times are predicted. Long
traces are thinned out evenly, and a note says so.
Legend: T steps, L MoE layers, N ranks, E experts, R records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_laer.choices import PlanMode
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import price
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.telemetry.metrics_file import Shape
from megatron_laer.telemetry.statistics import LayerPasses, priced_values
from megatron_laer.tools.report.recorded import stock_tokens_TLN
from megatron_laer.tools.report.run_data import Float64, RunData, expert_tokens_TLE, shape_settings
from megatron_laer.tools.simulator.replay import LayerPolicy, decide, layer_steps, walk
from megatron_laer.tools.traces.records import Trace

# Maximum decisions per replay; each takes about a millisecond.
MOST_CASES = 20_000
STRATEGY, MODE = FSEPConfig().planner, PlanMode.ADAPTIVE
_OF_COSTS = ("hidden", "ffn", "gated", "bytes_per_element")


def replayed_run(
    name: str,
    trace: Trace,
    geometry: Geometry,
    costs: CostModel,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> RunData:
    """Replay a trace; raise ValueError for one of other sizes or without tokens."""
    geometry.check_counts(trace.counts_RNE.shape[1:])
    if not trace.counts_RNE.any():
        raise ValueError(f"trace {name!r} holds no tokens; record a run that routes some")
    num_layers = len(trace.layers)
    groups = list(layer_steps(trace))
    all_steps = sorted({of.step for of in groups})
    decisions = -(-len(trace) // len(all_steps)) * len(all_steps)
    stride = max(1, -(-decisions // MOST_CASES))
    steps = all_steps[::stride]
    at = {step: index for index, step in enumerate(steps)}
    shape = (len(steps), num_layers)
    tokens_TLN = np.zeros((*shape, geometry.num_ranks), dtype=np.int64)
    of_layers: dict[str, Float64] = {}
    planned: dict[int, list[ExpertLayout]] = {}
    strategy = make_strategy(STRATEGY, geometry=geometry, costs=costs)
    guard = Guard(MODE, costs, geometry)
    static = geometry.static_layout
    policies = defaultdict[int, LayerPolicy](lambda: LayerPolicy(strategy, static))
    for _, ((step, layer, records), observed) in zip(progress(groups), walk(trace, 1), strict=True):
        if step not in at:
            continue
        policy = policies[layer]
        layout = policy.layout if observed is None else policy.plan(observed)
        planned.setdefault(step, [static] * num_layers)[layer] = layout
        place = at[step], layer
        outcomes = [decide(guard, trace.counts_NE(record), layout) for record in records]
        passes = LayerPasses.of(geometry.num_ranks, outcomes)
        tokens_TLN[place] = passes.rank_tokens_N
        prices = [price(guard, outcome) for outcome in outcomes]
        for metric, value in (passes.values() | priced_values(prices)).items():
            of_layers.setdefault(metric, np.full(shape, np.nan))[place] = value

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
    return RunData(
        name=name,
        shape=of,
        is_measured=False,
        steps_T=steps_T,
        imbalance_TL=of_layers["max_over_mean"],
        stock_TL=of_layers["stock_max_over_mean"],
        layer_ms_TL=of_layers["predicted_ms"] * of_layers["passes"],
        of_steps={},
        of_layers=of_layers,
        metrics={},
        rank_tokens_TLN=tokens_TLN,
        stock_rank_tokens_TLN=stock_tokens_TLN(experts_TLE, of),
        experts_TLE=experts_TLE,
        layouts=[(step, planned[step]) for step in steps],
        settings=[
            *shape_settings(of),
            ("planner", STRATEGY),
            ("plan_mode", MODE.value),
            ("cluster", costs.cluster.name),
            *((name, str(getattr(costs, name))) for name in _OF_COSTS),
        ],
        notes=_notes(stride, len(all_steps)),
        sharding=geometry.sharding,
    )


def _notes(stride: int, num_steps: int) -> list[str]:
    notes = [
        "Only routing was recorded: layouts and decisions are those that the planner and the guard "
        "would have made of it, and times are predicted, of MoE layers alone."
    ]
    if stride > 1:
        notes.append(f"Of {num_steps} recorded steps every {stride}th is shown.")
    return notes
