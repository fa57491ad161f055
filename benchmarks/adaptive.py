"""Table that compares the guard's choice by cost with always keeping and always replanning.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.costs import paper_costs
from benchmarks.splits import Outcome, Planner, split_exactly
from benchmarks.trace_cases import Case, Trace
from megatron_laer.config import ExchangeAlgorithm, PlanMode
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout

# (token, expert) pairs per rank and microbatch: the paper's runs have 16,384 tokens and top-2.
PAPER_PAIRS = 16384 * 2


@dataclass(frozen=True)
class _Setting:
    """One column block: the trace's counts times `scale`, restored by `algorithm`."""

    algorithm: ExchangeAlgorithm
    scale: int


def adaptive(
    trace: Trace, cases: Sequence[Case], greedy: Planner, static: ExpertLayout, node_size: int
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """Return outcomes, and predicted mean layer times by setting and layer.

    Settings are the restore algorithms, with the trace's own counts (4,096 pairs per rank) and with
    these scaled to the paper's pairs. Outcomes are those of a flat restore and the paper's pairs.

    `forecast` is charged nothing beyond the layer. `exact` is charged the solve and the exposed
    fetch of the slots that differ from the planned layout. This favours it over the whole restore
    that it needs without a plan (`exact_whole_ms`). `adaptive` is charged the same when it replans.
    Its solves without a replan are a column of their own, a mean over all cases like the others
    (`unused_solve_ms`).
    """
    geometry = Geometry(static.num_ranks, static.num_experts, static.capacity, node_size)
    guards = {
        algorithm: Guard(PlanMode.ADAPTIVE, paper_costs(algorithm), geometry)
        for algorithm in ExchangeAlgorithm
    }
    pairs = int(trace.now(cases[0]).sum()) // geometry.num_ranks
    scales = sorted({1, max(1, PAPER_PAIRS // pairs)})
    layouts: dict[int, ExpertLayout] = defaultdict(lambda: static)
    planned: dict[int, int] = {}
    rows: dict[tuple[int, _Setting], list[tuple[float, ...]]] = defaultdict(list)
    outcomes = []
    for case in cases:
        trace_NE = trace.now(case)
        if planned.get(case.layer) != case.iteration:
            layouts[case.layer] = greedy.plan(trace.forecast(case), layouts[case.layer])
            planned[case.layer] = case.iteration
        kept = layouts[case.layer]
        for scale in scales:
            counts_NE = trace_NE * scale
            fresh = construct_layout(counts_NE, kept, node_size)
            kept_s, fresh_s = (
                guards[ExchangeAlgorithm.FLAT].costs.layer_seconds(counts_NE, layout, node_size)
                for layout in (kept, fresh)
            )
            for algorithm, guard in guards.items():
                costs = guard.costs
                solve_s = costs.solve_seconds(geometry)
                changed_s = fresh_s + costs.change_seconds(kept, fresh, node_size)
                whole_s = fresh_s + solve_s + costs.restore_seconds(fresh, node_size, algorithm)
                decision = guard.decide(counts_NE, kept)
                chosen_s = changed_s if decision.replanned else kept_s
                unused_s = solve_s if decision.solved and not decision.replanned else 0.0
                rows[case.layer, _Setting(algorithm, scale)].append(
                    (kept_s, changed_s, whole_s, chosen_s, unused_s, decision.replanned)
                )
                if algorithm == ExchangeAlgorithm.FLAT and scale == scales[-1]:
                    outcome = split_exactly(counts_NE, decision.layout, node_size)
                    outcomes.append(replace(outcome, replanned=decision.replanned))
    return outcomes, list(_means(rows, static.capacity))


def _means(
    rows: dict[tuple[int, _Setting], list[tuple[float, ...]]], capacity: int
) -> Iterator[dict[str, Any]]:
    names = ("forecast_ms", "exact_ms", "exact_whole_ms", "adaptive_ms", "unused_solve_ms")
    for (layer, setting), cases in sorted(rows.items(), key=lambda item: item[0][0]):
        *seconds, replanned = np.array(cases).mean(axis=0)
        yield {
            "capacity": capacity,
            "restore": setting.algorithm,
            "scale": setting.scale,
            "layer": layer,
            **{name: float(mean) * 1e3 for name, mean in zip(names, seconds, strict=True)},
            "replan_share": float(replanned),
        }
