"""Compares the default planner with what it was without a choice: `python -m benchmarks.by_time`.

Both get the same cases of a routing trace. *Before* uses the layout that holds up under drift, from
a forecast of one weight. *Now* uses the layout that is predicted to be fastest, from the forecast
whose weight follows its errors. Layouts come from counts one record old and serve all microbatches
of their record.

Two more parts follow: steps whose every other microbatch is from a layer of the trace's other half,
and named workloads.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.adaptive import PAPER_PAIRS
from benchmarks.balance import CAPACITIES, NODE_SIZE
from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.costs import paper_costs
from benchmarks.report import machine, print_table
from benchmarks.trace_cases import Trace
from megatron_laer.arrays import Int64
from megatron_laer.config import PlanMode
from megatron_laer.files.checks import refuse_overwriting
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.tools.cli.argument_types import between, path
from megatron_laer.tools.simulator.replay import Outcome, evaluate
from megatron_laer.tools.traces.workloads import WORKLOADS, WorkloadShape, workload_counts

# Experts of the model, and (token, expert) pairs of a rank: 16,384 tokens, top-2 and top-8.
MODELS: dict[str, tuple[CostModel, int]] = {
    "Mixtral-8x7B": (paper_costs(), PAPER_PAIRS),
    "Qwen3-235B": (replace(paper_costs(), ffn=1536), PAPER_PAIRS * 4),
}
# Layers and records of the trace; parameters were chosen on the first two parts.
PARTS: dict[str, tuple[slice, slice]] = {
    "chosen on, early": (slice(0, None, 2), slice(0, 150)),
    "chosen on, late": (slice(0, None, 2), slice(150, None)),
    "held out, early": (slice(1, None, 2), slice(0, 150)),
    "held out, late": (slice(1, None, 2), slice(150, None)),
    "all": (slice(None), slice(None)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.by_time", __doc__)
    parser.add_argument("--trace", type=path, required=True, help="npz with tokens [I, L, N, M, E]")
    parser.add_argument("--part", choices=PARTS, default="all", help="default: %(default)s")
    parser.add_argument(
        "--every", type=between(1, 10**9), default=1, help="every so many-th record is evaluated"
    )
    add_json(parser)
    options = parser.parse_args(arguments)
    layers, records = PARTS[options.part]
    if options.json is not None:
        refuse_overwriting(options.json, [options.trace], "--json")
    counts = Trace(options.trace).counts[records, layers]
    if counts.shape[0] < 2 or counts.shape[1] < 2 or options.every >= counts.shape[0]:
        raise ValueError(
            f"{options.trace} has {counts.shape[0]} records of {counts.shape[1]} layers in --part "
            f"{options.part!r}, too few for --every {options.every}"
        )
    half = counts.shape[1] // 2
    mixed = counts[:, :half].copy()
    mixed[:, :, 1::2] = counts[:, half : 2 * half, 1::2]
    result = {
        "machine": machine(),
        "part": options.part,
        "rows": list(rows(counts, options.every)),
        "mixed": list(rows(mixed, options.every)),
        "workloads": list(workloads(17)),
    }
    print(json.dumps(result["machine"]), options.part)
    print_table(result["rows"])
    print("every other microbatch of another kind")
    print_table(result["mixed"])
    print_table(result["workloads"])
    write_json(options.json, result)
    return 0


def workloads(steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row per named workload and shape: layouts one microbatch old, Mixtral-8x7B."""
    costs, _ = MODELS["Mixtral-8x7B"]
    for num_ranks, num_experts, capacity in ((16, 32, 3), (16, 32, 4), (64, 64, 4)):
        geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
        shape = WorkloadShape(num_ranks, num_experts, topk=2, tokens=16384)
        guard = Guard(PlanMode.FORECAST, costs, geometry)
        for name in WORKLOADS:
            line: dict[str, Any] = {"workload": name, "N, E, C": str(shape_key(geometry))}
            for planner, strategy in (
                ("before", GreedyStrategy(geometry)),
                ("now", GreedyStrategy(geometry, costs)),
            ):
                layout = ExpertLayout.static(num_ranks, capacity, num_experts)
                found = []
                for step in range(1, steps):
                    layout = strategy.plan(workload_counts(name, shape, step - 1), layout)
                    found.append(evaluate(guard, workload_counts(name, shape, step), layout))
                summary = _summary(found)
                line |= {
                    f"{key} {planner}": summary[key] for key in ("mean", "off_node", "layer_ms")
                }
            yield line


def shape_key(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.num_ranks, geometry.num_experts, geometry.capacity


def rows(counts: Int64, every: int) -> Iterator[dict[str, Any]]:
    """Yield a row per capacity, model, planner and mode.

    `counts` are tokens, [records, layers, microbatches, N, E].
    """
    num_ranks, num_experts = counts.shape[-2:]
    for capacity in CAPACITIES:
        geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
        for model, (costs, pairs) in MODELS.items():
            scale = pairs // int(counts[0, 0, 0, 0].sum())
            planners: dict[str, tuple[GreedyStrategy, Callable[[], SmoothedForecast]]] = {
                "before": (GreedyStrategy(geometry), lambda: SmoothedForecast(weight=0.75)),
                "now": (GreedyStrategy(geometry, costs), SmoothedForecast),
            }
            for name, (strategy, begin) in planners.items():
                guards = {
                    mode: Guard(mode, costs, geometry)
                    for mode in (PlanMode.FORECAST, PlanMode.ADAPTIVE, PlanMode.EXACT)
                }
                outcomes = _outcomes(counts, scale, every, strategy, begin, guards)
                for mode, found in outcomes.items():
                    yield {
                        "capacity": capacity,
                        "model": model,
                        "planner": name,
                        "mode": mode.value,
                        **_summary(found),
                    }


def _outcomes(
    counts: Int64,
    scale: int,
    every: int,
    strategy: GreedyStrategy,
    begin: Callable[[], SmoothedForecast],
    guards: dict[PlanMode, Guard],
) -> dict[PlanMode, list[Outcome]]:
    geometry = strategy.geometry
    static = ExpertLayout.static(geometry.num_ranks, geometry.capacity, geometry.num_experts)
    found: dict[PlanMode, list[Outcome]] = {mode: [] for mode in guards}
    for layer in range(counts.shape[1]):
        forecast, layout = begin(), static
        for record in range(counts.shape[0]):
            if record and record % every == 0:
                layout = strategy.plan(forecast.counts_NE(), layout)
                for counts_NE in counts[record, layer]:
                    for mode, guard in guards.items():
                        found[mode].append(evaluate(guard, counts_NE * scale, layout))
            forecast = forecast.observe(counts[record, layer].sum(axis=0))
    return found


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ratios = np.array([outcome.max_over_mean for outcome in outcomes])
    off_node = sum(outcome.node_rows.off_node for outcome in outcomes)
    return {
        "cases": len(outcomes),
        "off_node": round(off_node / sum(outcome.tokens for outcome in outcomes), 4),
        "mean": round(float(ratios.mean()), 4),
        "p95": round(float(np.percentile(ratios, 95)), 4),
        "p99": round(float(np.percentile(ratios, 99)), 4),
        "layer_ms": round(float(np.mean([outcome.layer_s for outcome in outcomes])) * 1e3, 2),
        "replanned": round(float(np.mean([outcome.replanned for outcome in outcomes])), 4),
    }


if __name__ == "__main__":
    program("python -m benchmarks.by_time", main)
