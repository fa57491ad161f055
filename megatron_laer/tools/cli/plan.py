"""The command `plan` compares strategies and modes on a recorded run or a workload."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_laer.choices import Auto, ExchangeAlgorithm, Recompute, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.files import memory
from megatron_laer.files.checks import one_line
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.planner.token_exchange import token_seconds
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.cli import fp8_flags, plan_homes, routing_input
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
    recording_of,
)
from megatron_laer.tools.model_flags import DEFAULT_SIZES, MAX_WIDTH
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
from megatron_laer.tools.simulator.replay import check_memory, kept_forecasts
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import TITLES, WorkloadShape, workload_trace

_DEFAULT_TOLERANCE = 0.05
# Maximum of --lag and --every: more than any trace has records.
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
    stride, width = between(1, _MAX_STRIDE), between(1, MAX_WIDTH)
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
    text = "age of the newest counts, in steps of the trace; default: %(default)s"
    option(parser, "--lag D", text, stride, default=1)
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
    text = "a model, for its experts' sizes in bf16; default: the recorded, else those of"
    option(parser, "--config NAME|YAML", f"{text} mixtral-8x7b-e8k2")
    text = "default: the model's or the recorded, else"
    option(parser, "--hidden H", f"width of a token; {text} {DEFAULT_SIZES.hidden}", width)
    option(parser, "--ffn F", f"width of an expert; {text} {DEFAULT_SIZES.ffn}", width)
    fp8_flags.add_arguments(parser, "the model's, or the recorded")
    text = "only every K-th microbatch, to be quick; a prime number meets all layers; default:"
    option(parser, "--every K", f"{text} %(default)s", stride, default=1)
    shared(parser, "--hours X", "never")
    plan_homes.add_arguments(parser)
    shared(parser, "--json FILE")


def run(args: argparse.Namespace) -> int:
    metrics = None if args.trace is None else metrics_beside(args.trace)
    _check(args, metrics)
    recording = recording_of(metrics)
    flags = vars(args) | {
        "top_k": args.topk,
        "precision": fp8_flags.given_precision(args, None),
        "imbalance_tolerance": args.tolerance,
    }
    settings = prediction_settings(flags, recording, metrics)
    costs, sizes, cluster = settings.costs, settings.sizes, settings.costs.cluster
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    tolerance = settings.tolerance if args.homes is None else args.tolerance
    tolerance = _DEFAULT_TOLERANCE if tolerance is None else tolerance

    source, recorded = _routing(args, num_experts)
    if metrics is not None and recording is not None and args.trace_ranks is None:
        check_same_run(metrics, recording.shape, args.trace, recorded)
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    recorded.check_divides(num_ranks)
    geometries, of_shape = settings.geometries(
        num_ranks, recorded.num_experts, args.capacity or [], args.node_size
    )
    from_recording = [*settings.recorded, *of_shape]
    node_size = geometries[0].node_size
    if args.homes is not None:
        return plan_homes.run(args, recorded, num_ranks, node_size, tolerance)
    check_memory(
        num_ranks,
        recorded.num_experts,
        record_bytes=4 * len(recorded),
        forecasts=kept_forecasts(recorded, args.lag),
        purpose=f"planning {len(recorded)} microbatches for {num_ranks:,} ranks",
    )
    chosen_cases(recorded, args.lag, args.every)  # refuses a trace without any
    trace = recorded.with_ranks(num_ranks)
    top_k = settings.top_k(trace)
    tokens = trace.tokens_per_rank(top_k)
    shapes = settings.priced(trace, geometries)
    exchange_s = token_seconds(costs, geometries[0], top_k, tokens)
    priced = ", ".join(dict.fromkeys(of.tokens.exchange for of in shapes.values()))
    about = {
        "trace": source,
        "steps": len(set(trace.step_R.tolist())),
        "layers": len(trace.layers),
        "records": len(trace),
        "recorded_ranks": recorded.num_ranks,
        "ranks": num_ranks,
        "experts": trace.num_experts,
        "node_size": node_size,
        "cluster": cluster.name,
        "expert_sizes": asdict(sizes),
        "bytes_per_element": costs.bytes_per_element,
        "precision": costs.precision,
        "sharding": settings.sharding,
        "restore_algorithm": settings.restore_algorithm,
        "recompute": costs.recompute,
        "from_recording": from_recording,
        "token_exchange": priced,
        "token_exchange_ms": {name: seconds * 1e3 for name, seconds in exchange_s.items()},
        "tolerance": tolerance,
        "lag": args.lag,
        "every": args.every,
    }
    print(
        one_line(
            f"{source}: {about['steps']} steps, {about['layers']} layers, {len(trace)} records"
            f", {trace.num_experts} experts, {recorded.num_ranks} ranks"
        )
    )
    if settings.note:
        print(one_line(f"plan: {settings.note}"), file=sys.stderr)

    def origin(*names: str) -> str:
        return " (by default)" if {*names} & {*settings.defaults} else ""

    at_home = ", at home" if settings.sharding == Sharding.EXPERTS else ""
    if costs.precision.is_quantised:
        at_home += f", in {costs.precision.label}"
    origins = f"; from {metrics}: {', '.join(from_recording)}" if from_recording else ""
    print(
        one_line(
            f"planned for {num_ranks} ranks in nodes of {node_size} on {cluster.name}"
            f"{origin('cluster')}; experts of {sizes.widths}{origin('hidden', 'ffn')}{at_home}"
            f"{origins}"
        )
    )
    in_words = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in exchange_s.items())
    print(
        f"tokens are priced as they travel by {priced}; expected for even counts, {tokens} tokens "
        f"of top-{top_k} and C = {geometries[0].capacity}: {in_words}",
        end="\n\n",
    )

    strategies = args.strategy or [*BASELINES, FSEPConfig().planner]
    rows = simulate(
        trace,
        shapes,
        strategies,
        args.mode or MODES,
        tolerance=tolerance,
        lag=args.lag,
        every=args.every,
        progress=bar("planning", unit="case"),
    )
    # The file first: a reader of the table that stops early would end the command.
    if args.json is not None:
        plan_output.write_json(args.json, about, rows)
    print(plan_output.table_text(rows))
    print(f"\n{plan_output.shortest(rows)}")
    print(
        f"{rows[0].cases} cases: microbatches of one layer each, with layouts from counts that "
        f"are {args.lag} recorded step(s) old.\nRows of {' and '.join(BASELINES)} are for "
        "comparison, always in mode forecast."
    )
    if rows[0].node_rows["home"]:
        home = f"{rows[0].node_rows['home']:.1%}"
        print(f"{home} of pairs leave their node with one copy of each expert, in this order.")
    if settings.sharding == Sharding.EXPERTS and any(map(lays_out_freely, strategies)):
        print("laer leaves no expert at home: its rows are those of --sharding rows.")
    if trace.num_experts % num_ranks != 0:
        print(f"No row for stock EP, which needs {trace.num_experts} experts / {num_ranks} ranks.")
    print(plan_output.LEGEND)
    return 0


def _routing(args: argparse.Namespace, num_experts: int | None) -> tuple[str, Trace]:
    if args.workload is None:
        return str(args.trace), routing_input.read(args, num_experts, pairs=args.homes is not None)
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
