"""Compares planners and quotas in balance and speed: `python -m benchmarks.planner --help`.

Everything runs here, in one process on one thread: our strategies with exact quotas, and rivals
with their own splitting. The balance part needs a routing trace (see `balance`) and is skipped
without one.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.balance import balance
from benchmarks.bounds import must_show
from benchmarks.command_line import add_json, output, parser_of, program, write_json
from benchmarks.costs import paper_costs
from benchmarks.report import machine, print_table
from benchmarks.speed import GROWTH_SHAPES, SOLVE_SHAPES, quota_times, relative_times, solve_times
from benchmarks.splits import split_exactly
from benchmarks.trace_cases import Trace
from megatron_laer.arrays import Int64
from megatron_laer.files.checks import refuse_overwriting
from megatron_laer.files.writing import write_file
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.tools.cli.argument_types import between, path
from megatron_laer.tools.simulator.rendering import check_can_plot
from megatron_laer.tools.traces.workloads import WORKLOADS, WorkloadShape, workload_counts

# Stride of `--quick`'s cases; prime, so that it meets all layers and microbatches.
QUICK_STRIDE = 37
NODE_SIZE = 8
SOLVE_KEYS = ("ranks", "capacity", "experts", "median_ms")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.planner", __doc__)
    parser.add_argument("--trace", type=path, help="npz with tokens [I, L, N, M, E]")
    add_json(parser)
    parser.add_argument("--plot", type=output, help="where to write the growth of the layout time")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK_STRIDE}th case")
    parser.add_argument(
        "--offset", type=between(0, QUICK_STRIDE - 1), default=0, help="first case of --quick"
    )
    options = parser.parse_args(arguments)
    if options.plot is not None:
        check_can_plot(options.plot)
    trace = None
    if options.trace is not None:
        for flag, given in (("--json", options.json), ("--plot", options.plot)):
            if given is not None:
                refuse_overwriting(given, [options.trace], flag)
        trace = Trace(options.trace)
        cases = trace.cases(*((QUICK_STRIDE, options.offset) if options.quick else (1, 0)))
        if not cases:
            raise ValueError(
                f"--offset {options.offset}: {options.trace} has no case from there on"
            )
    result: dict[str, Any] = {"machine": machine(), "balance": []}
    print(json.dumps(result["machine"]))
    repeats = 21 if options.quick else 101
    solved = list(solve_times(SOLVE_SHAPES, repeats))
    print_table(solved)
    result["solve"] = [{key: row[key] for key in SOLVE_KEYS} for row in solved]
    result["growth"] = list(solve_times(GROWTH_SHAPES, max(repeats // 5, 5)))
    print_table(result["growth"])
    result["relative"] = list(relative_times(max(repeats // 5, 5)))
    print_table(result["relative"])
    result["quotas"] = list(quota_times(repeats))
    print_table(result["quotas"])
    result["workloads"] = list(named_workloads(4 if options.quick else 16))
    print_table(result["workloads"])
    if trace is None:
        print("no balance table: no trace; pass --trace PATH", file=sys.stderr)
    else:
        result["predicted"] = []
        for row in balance(trace, cases, result["predicted"]):
            result["balance"].append(asdict(row))
            print(json.dumps(result["balance"][-1]), file=sys.stderr, flush=True)
        print_table(result["balance"])
        print_table(result["predicted"])
    print_table([asdict(figure) for figure in must_show(result)])
    if options.plot is not None:
        plot_growth(result["growth"], options.plot)
    write_json(options.json, result)
    return 0


def named_workloads(count: int) -> Iterator[dict[str, Any]]:
    """Yield results for exact counts and counts one microbatch old, also for other shapes."""
    for num_ranks, num_experts, capacity in ((16, 32, 3), (16, 32, 4), (32, 8, 2), (64, 64, 4)):
        geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
        greedy = make_strategy("greedy", geometry=geometry, costs=paper_costs())
        static = ExpertLayout.static(num_ranks, capacity, num_experts)
        shape = WorkloadShape(num_ranks, num_experts, topk=2, tokens=2048)
        for name in WORKLOADS:
            exact, old = [], []
            before_NE: Int64 | None = None
            for step in range(count):
                counts_NE = workload_counts(name, shape, step)
                layout = construct_layout(counts_NE, static, NODE_SIZE)
                exact.append(split_exactly(counts_NE, layout, NODE_SIZE))
                if before_NE is not None:
                    layout = greedy.plan(before_NE, static)
                    old.append(split_exactly(counts_NE, layout, NODE_SIZE))
                before_NE = counts_NE
            yield {
                "workload": name,
                "ranks": num_ranks,
                "experts": num_experts,
                "capacity": capacity,
                "exact_violations": sum(outcome.violation for outcome in exact),
                "exact_off_node_share": float(np.mean([o.off_node_share for o in exact])),
                "microbatch_old_mean": float(np.mean([o.ratio for o in old])),
            }


def plot_growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    figure, axes = pyplot.subplots()
    for capacity, experts in sorted({(row["capacity"], row["experts"]) for row in rows}):
        chosen = [row for row in rows if (row["capacity"], row["experts"]) == (capacity, experts)]
        ranks = [row["ranks"] for row in chosen]
        for key, name, marker in (
            ("fresh_median_ms", "known counts", "o"),
            ("greedy_median_ms", "greedy", "s"),
        ):
            label = f"{name}, C = {capacity}, E = {experts}"
            axes.loglog(ranks, [row[key] for row in chosen], marker=marker, label=label)
    axes.set_xlabel("ranks")
    axes.set_ylabel("ms, one thread, median")
    axes.set_title("Layout time")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_file(path, content.getvalue())


if __name__ == "__main__":
    program("python -m benchmarks.planner", main)
