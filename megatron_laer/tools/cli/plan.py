"""The command `plan` compares strategies and modes on a recorded run or a workload."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megatron_laer.choices import Auto, ExchangeAlgorithm, Recompute, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.files import memory
from megatron_laer.files.checks import one_line
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.cli import plan_homes, routing_input
from megatron_laer.tools.cli.argument_types import (
    MAX_TOKENS,
    MOST_RANKS,
    between,
    describe,
    number,
    option,
    refuse_repeated,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import bar, check_outputs
from megatron_laer.tools.cli.prediction_settings import (
    DEFAULT_CLUSTER,
    prediction_settings,
)
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.recorded import check_same_run
from megatron_laer.tools.report.run_files import metrics_beside
from megatron_laer.tools.simulator import plan_output
from megatron_laer.tools.simulator.comparison import (
    BASELINES,
    MODES,
    TOLERANCE,
    chosen_cases,
    simulate,
)
from megatron_laer.tools.simulator.replay import check_memory
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import TITLES, WorkloadShape, workload_trace

_DEFAULT_TOLERANCE = 0.05
# Maximum of --every: more than any trace has records.
_MAX_STRIDE = 10**9
# Flags of a workload, with the letter of their value, its maximum and default, and help.
_WORKLOAD_ONLY = {
    "--topk": ("K", MAX_EXPERTS, 2, "experts of a token"),
    "--tokens": ("T", MAX_TOKENS, 4096, "tokens of a rank"),
    "--steps": ("M", 10**5, 32, "steps, of a microbatch each"),
}
# Bytes per count of a workload: 8 to make it, 4 to keep it.
_BYTES_PER_COUNT = 12

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace
  %(prog)s traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s traces/group-0.trace --cluster my-cluster.yaml --config my-model.yaml --every 97
  %(prog)s traces/group-0.trace --node-size 8 --homes homes.json
  %(prog)s --workload W6 --ranks 32 --experts 128 --topk 8
  %(prog)s traces --strategy greedy --mode forecast adaptive --json plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Balance, traffic and predicted time of a layer under each strategy, for a recorded run or "
        "a named workload.",
        _EXAMPLES,
    )
    routing_input.add_arguments(parser)
    option(parser, "--experts E", "for workloads", between(1, MAX_EXPERTS))
    for flag, (letter, high, usual, text) in _WORKLOAD_ONLY.items():
        text = f"of a workload: {text}; default: {usual}"
        option(parser, f"{flag} {letter}", text, between(1, high))
    shared(parser, "--ranks N", "as in the trace")
    shared(parser, "--capacity C", "the recorded, else min(E, ceil(E/N) + 1)", nargs="+")
    shared(parser, "--node-size G", "the recorded, else the cluster's, at most N")
    shared(parser, "--cluster NAME|YAML", f"the recorded, else {DEFAULT_CLUSTER}")
    for flag, choices in (("--strategy NAME", strategy_names()), ("--mode MODE", MODES)):
        text = f"of {', '.join(choices)}; default: all"
        option(parser, flag, text, nargs="+", choices=choices)
    text = "of mode tolerance: replan where max/mean exceeds 1 + X; default: the recorded, else"
    text = f"{text} {_DEFAULT_TOLERANCE} (--homes: stock's + X; {_DEFAULT_TOLERANCE})"
    option(parser, "--tolerance X", text, number(0, MOST_RANKS))
    predicted = "for the predicted time"
    again = f"what backward computes again, {predicted}: nothing; all of an MoE layer, token"
    for flag, words, text in (
        ("--sharding", [*Sharding], "rows of every expert on each rank, or home experts"),
        ("--restore-algorithm", [*ExchangeAlgorithm, Auto.AUTO], "how experts are fetched"),
        ("--token-exchange", [*TokenExchange, Auto.AUTO], f"how tokens travel, {predicted}"),
        ("--recompute", [*Recompute], f"{again} exchanges included; or its compute alone"),
    ):
        text = f"{text}; default: the recorded, else {words[0]}"
        option(parser, flag, text, choices=[str(word) for word in words])
    text = "a model, for its experts' sizes; default: the recorded, else those of"
    option(parser, "--config NAME|YAML", f"{text} mixtral-8x7b-e8k2")
    text = "only every K-th microbatch, to be quick; a prime number meets all layers; default: 1"
    option(parser, "--every K", text, between(1, _MAX_STRIDE))
    plan_homes.add_arguments(parser)
    shared(parser, "--json FILE")


def run(args: argparse.Namespace) -> int:
    metrics = None if args.trace is None else metrics_beside(args.trace)
    _check(args, metrics)
    recording = None if metrics is None else read_metrics(metrics)
    flags = vars(args) | {"top_k": args.topk, "imbalance_tolerance": args.tolerance}
    settings = prediction_settings(flags, recording, metrics)
    costs, sizes = settings.costs, settings.sizes
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    tolerance = settings.tolerance if args.homes is None else args.tolerance
    tolerance = _DEFAULT_TOLERANCE if tolerance is None else tolerance
    every = args.every or 1

    source, recorded = _routing(args, num_experts)
    if metrics is not None and recording is not None:
        check_same_run(metrics, recording.shape, args.trace, recorded)
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
    chosen_cases(recorded, every)  # refuses a trace without any
    trace = recorded.with_ranks(num_ranks)
    priced = settings.priced(trace, geometries)
    strategies = args.strategy or [*BASELINES, FSEPConfig().planner]
    rows = simulate(
        trace,
        priced,
        strategies,
        args.mode or MODES,
        tolerance=tolerance,
        every=every,
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
        "token_exchange": ", ".join(dict.fromkeys(of.tokens.exchange for of in priced.values())),
        "recompute": costs.recompute,
        "tolerance": tolerance,
        "every": every,
    }
    # The file first: a reader of the table that stops early would end the command.
    if args.json is not None:
        plan_output.write_json(args.json, about, rows)
    print(f"{plan_output.shortest(rows)}\n")
    said = "steps", "layers", "records", "experts"
    sizes_of_trace = ", ".join(f"{about[name]} {name}" for name in said)
    print(one_line(f"{source}: {sizes_of_trace}, {recorded.num_ranks} ranks"))
    recorded_in = "" if metrics is None else f"; what no flag gives is from {metrics}"
    print(
        one_line(
            f"planned for {num_ranks} ranks in nodes of {node_size}: {settings.words()}"
            f"{recorded_in}"
        ),
        end="\n\n",
    )
    print(plan_output.table_text(rows))
    print(
        f"\n{rows[0].cases} cases: microbatches of one layer each, with layouts of the counts of "
        f"earlier steps.\nRows of {' and '.join(BASELINES)} are for comparison, always in mode "
        "forecast."
    )
    if settings.sharding == Sharding.EXPERTS and any(map(lays_out_freely, strategies)):
        print("laer leaves no expert at home: its rows are those of --sharding rows.")
    if trace.num_experts % num_ranks != 0:
        print(f"No row for stock EP, which needs {trace.num_experts} experts / {num_ranks} ranks.")
    print(plan_output.LEGEND)
    return 0


def _routing(args: argparse.Namespace, num_experts: int | None) -> tuple[str, Trace]:
    if args.workload is None:
        return str(args.trace), read_trace(
            args.trace, num_experts=num_experts, pairs=args.homes is not None
        )
    assert num_experts is not None
    topk, tokens, steps = (
        default if (given := getattr(args, flag.removeprefix("--"))) is None else given
        for flag, (_, _, default, _) in _WORKLOAD_ONLY.items()
    )
    shape = WorkloadShape(args.ranks, num_experts, topk, tokens)
    memory.check_enough(
        _BYTES_PER_COUNT * steps * args.ranks * num_experts,
        f"{steps} steps of {args.ranks} ranks and {num_experts} experts",
        "give fewer --steps",
    )
    name = f"{args.workload} {TITLES[args.workload]}, top-{topk}, {tokens} tokens per rank"
    return name, workload_trace(args.workload, shape, steps, progress=bar("drawing", leave=False))


def _check(args: argparse.Namespace, metrics: Path | None) -> None:
    refuse_repeated(args, ("--strategy", "--mode", "--capacity"))
    if args.tolerance is not None and TOLERANCE not in (args.mode or MODES):
        raise ValueError(
            f"--tolerance {args.tolerance}: no effect without --mode {TOLERANCE}; add that mode, "
            "or leave the tolerance out"
        )
    routing_input.check(args, "plan for")
    plan_homes.check(args)
    if args.workload is None:
        routing_input.refuse(args, tuple(_WORKLOAD_ONLY), "add --workload")
    elif args.experts is None and args.config is None:
        raise ValueError(
            f"--workload {args.workload} has no experts of its own; give --experts or --config"
        )
    inputs = yaml_inputs(cluster=("cluster", args.cluster), config=("model", args.config))
    outputs = {"--homes": args.homes, "--json": args.json}
    check_outputs(outputs, [*inputs, metrics], args.trace)
