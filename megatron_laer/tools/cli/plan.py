"""The command `plan` compares strategies and modes on a recorded run or a workload."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.choices import Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import one_line
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.tools.cli import plan_homes, prediction_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    add_force,
    between,
    named,
    number,
    option,
    refuse_repeated,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import check_outputs, write_json
from megatron_laer.tools.cli.prediction_input import DEFAULT_CLUSTER, prediction_settings
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.logs import read_logs
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.run_files import metrics_beside, run_of_metrics
from megatron_laer.tools.simulator.comparison import (
    BASELINES,
    MODES,
    STOCK,
    TOLERANCE,
    PlanRow,
    simulate,
)
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.output import filled, table
from megatron_laer.tools.simulator.replay import check_memory
from megatron_laer.tools.simulator.run_settings import RunSettings
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import TITLES

_DEFAULT_TOLERANCE = 0.05
# Maximum of --every: more than any trace has records.
_MAX_STRIDE = 10**9

_MIB = 2**20
_COLUMNS: Mapping[str, Callable[[PlanRow], str]] = {
    "strategy": lambda row: row.strategy,
    "mode": lambda row: row.mode,
    "C": lambda row: f"{row.capacity}",
    "mean": lambda row: f"{row.mean:.4f}",
    "p99": lambda row: f"{row.p99:.4f}",
    "off-node": lambda row: f"{row.off_node_share:.1%}",
    "replans": lambda row: f"{row.replan_share:.1%}",
    "restored MiB": lambda row: f"{row.restored_bytes / _MIB:.1f}",
    "layer ms": lambda row: f"{row.layer_ms:.3f}",
}
_WORDS = (0, 1)  # columns of text

_LEGEND = """\
mean, p99: of max/mean tokens per rank. off-node: tokens computed on another node than their own.
replans: microbatches whose layout was made after the gate. restored MiB: received by the busiest
rank in one forward pass. layer ms: predicted, forward and backward, with the cost of replans, and
of home experts' replicas as far as it is not hidden; rows are taken to be restored unseen, and
stock's tokens go by rank, or as FSEP's with the flex dispatcher."""

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace
  %(prog)s traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s traces/group-0.trace --cluster my-cluster.yaml --config my-model.yaml --every 97
  %(prog)s traces/group-0.trace --node-size 8 --homes homes.json
  %(prog)s --workload W6 --ranks 32 --config qwen3-30b-a3b
  %(prog)s traces --strategy greedy --mode forecast adaptive --json plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Balance, traffic and predicted time of a layer under each strategy, for a recorded run or "
        "a named workload.",
        _EXAMPLES,
    )
    prediction_input.add_routing(parser)
    shared(parser, "--tokens T", "a sequence of a workload's model")
    shared(parser, "--ranks N", "as in the trace")
    shared(parser, "--capacity C", "the recorded, else min(E, ceil(E/N) + 1)", nargs="+")
    shared(parser, "--node-size G", "the recorded, else the cluster's, at most N")
    shared(parser, "--cluster NAME|YAML", f"the recorded, else {DEFAULT_CLUSTER}")
    for flag, choices in (("--strategy NAME", strategy_names()), ("--mode MODE", MODES)):
        text = f"of {', '.join(choices)}; default: all"
        option(parser, flag, text, nargs="+", choices=choices)
    text = "replan where max/mean exceeds 1 + X; of --homes: stock's + X; default: the recorded,"
    option(parser, "--tolerance X", f"{text} else {_DEFAULT_TOLERANCE}", number(0, MOST_RANKS))
    text = "rows of every expert on each rank, or home experts; default: the recorded, else"
    option(parser, "--sharding", f"{text} {Sharding.ROWS}", choices=[*map(str, Sharding)])
    text = "a model, for its experts' sizes, and for a workload; default: the recorded, else that"
    option(parser, "--config NAME|YAML", f"{text} of mixtral-8x7b-e8k2")
    text = "only every K-th microbatch, to be quick; a prime number meets all layers; default: 1"
    option(parser, "--every K", text, between(1, _MAX_STRIDE))
    plan_homes.add_arguments(parser)
    shared(parser, "--json FILE")
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    metrics = None if args.trace is None else metrics_beside(args.trace)
    _check(args, metrics)
    recording = None if metrics is None else read_metrics(metrics)
    flags = vars(args) | {"imbalance_tolerance": args.tolerance}
    settings = prediction_settings(flags, recording, metrics)
    costs, sizes = settings.costs, settings.sizes
    tolerance = settings.tolerance if args.homes is None else args.tolerance
    tolerance = _DEFAULT_TOLERANCE if tolerance is None else tolerance
    every = args.every or 1

    source, recorded = _routing(args, sizes.num_experts)
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    recorded.check_divides(num_ranks)
    geometries = settings.geometries(
        num_ranks, recorded.num_experts, args.capacity or [], args.node_size
    )
    node_size = geometries[0].node_size
    if args.homes is not None:
        return plan_homes.run(args, recorded, num_ranks, node_size, tolerance)
    check_memory(
        recorded,
        num_ranks,
        record_bytes=4 * len(recorded),
        purpose=f"planning {len(recorded)} microbatches for {num_ranks:,} ranks",
    )
    trace = recorded.with_ranks(num_ranks)
    iterations, of_run = None, ""
    if metrics is not None and recording is not None and len(recording.steps_T):
        logs = read_logs(run_of_metrics(metrics), recording)
        of_run = f"{assess(recording, logs).sentence()}."
        if np.isin(trace.step_R + 1, logs.iterations).any():
            iterations = logs.iterations
    priced = settings.priced(trace, geometries)
    strategies = args.strategy or [*BASELINES, FSEPConfig().planner]
    rows = simulate(
        trace,
        priced,
        strategies,
        args.mode or MODES,
        tolerance=tolerance,
        every=every,
        iterations=iterations,
        progress=bar("planning", unit="case"),
    )
    about = {
        "trace": source,
        "steps": len(set(trace.step_R.tolist())),
        "layers": len(trace.layers),
        "records": len(trace),
        "recorded_ranks": recorded.num_ranks,
        "ranks": num_ranks,
        "experts": trace.num_experts,
        "node_size": node_size,
        "cluster": costs.cluster.name,
        "expert_sizes": asdict(sizes),
        "bytes_per_element": costs.bytes_per_element,
        "precision": costs.precision,
        "sharding": settings.sharding,
        "restore_algorithm": settings.restore_algorithm,
        "token_exchange": settings.dispatch,
        "recompute": costs.recompute,
        "tolerance": tolerance,
        "every": every,
        "iterations": iterations and [iterations[0], iterations[-1]],
    }
    # The file first: a reader of the table that stops early would end the command.
    write_json(args.json, {**about, "rows": [asdict(row) for row in rows]})
    if of_run:
        print(filled(one_line(of_run)))
    print(_text(about, rows, settings, metrics))
    return 0


def _text(
    about: Mapping[str, Any], rows: Sequence[PlanRow], settings: RunSettings, metrics: Path | None
) -> str:
    counts = ", ".join(
        f"{about[name]} {name}" for name in ("steps", "layers", "records", "experts")
    )
    recorded_in = "" if metrics is None else f"; what no flag gives is from {metrics}"
    planned_for = f"planned for {about['ranks']} ranks in nodes of {about['node_size']}"
    window = about["iterations"]
    within = f" in the iterations {window[0]} to {window[1]}" if window else ""
    lines = [
        f"{filled(_shortest(rows))}\n",
        filled(one_line(f"{about['trace']}: {counts}, {about['recorded_ranks']} ranks")),
        filled(one_line(f"{planned_for}: {settings.words()}{recorded_in}")) + "\n",
        table(_COLUMNS, rows, _WORDS),
        f"\n{rows[0].cases} cases: microbatches of one layer each{within}, with layouts of the",
        "counts of earlier steps.",
        f"Rows of {' and '.join(BASELINES)} are for comparison, always in mode forecast; laer",
        "splits tokens evenly and leaves no expert at home. Stock EP has a row where N divides E.",
        _LEGEND,
    ]
    return "\n".join(lines)


def _routing(args: argparse.Namespace, num_experts: int | None) -> tuple[str, Trace]:
    if args.workload is None:
        return str(args.trace), read_trace(
            args.trace, num_experts=num_experts, pairs=args.homes is not None
        )
    model = named("--config", args.config, read_model)
    trace = prediction_input.workload(model, args.workload, args.ranks, args.tokens)
    return f"{args.workload} {TITLES[args.workload]} of {args.config}", trace


def _check(args: argparse.Namespace, metrics: Path | None) -> None:
    refuse_repeated(args, ("--strategy", "--mode", "--capacity"))
    if args.tolerance is not None and TOLERANCE not in (args.mode or MODES):
        raise ValueError(
            f"--tolerance {args.tolerance}: no effect without --mode {TOLERANCE}; add that mode, "
            "or leave the tolerance out"
        )
    prediction_input.check_routing(args, "plan for")
    plan_homes.check(args)
    if args.workload is None:
        prediction_input.refuse(args, ("--tokens",), "add --workload")
    elif args.config is None:
        raise ValueError(f"--workload {args.workload} has no experts of its own; give --config")
    inputs = yaml_inputs(cluster=("cluster", args.cluster), config=("model", args.config))
    outputs = {"--homes": args.homes, "--json": args.json}
    check_outputs(outputs, [*inputs, metrics], args.trace, force=args.force)


def _shortest(rows: Sequence[PlanRow]) -> str:
    """Name the row with the shortest layer, and its gain over stock, if that is a row."""
    best, first = min(rows, key=lambda row: row.layer_ms), rows[0]
    named = best.strategy if best.mode == "-" else f"{best.strategy} {best.mode}"
    found = f"Shortest layer: {named}, C = {best.capacity}, {best.layer_ms:.3f} ms predicted"
    if first.strategy != STOCK or best is first:
        return f"{found}."
    return (
        f"{found}, {first.layer_ms / best.layer_ms:.2f} times as fast as stock EP in MoE layers "
        f"alone, and less in a whole step; max/mean tokens per rank {best.mean:.3f}, where stock "
        f"EP has {first.mean:.3f}."
    )
