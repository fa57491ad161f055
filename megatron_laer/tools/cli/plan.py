"""The command `plan` prints what each strategy would have made of a recorded run or a workload."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_laer.choices import Recompute, TokenExchange, TokenExchangeChoice
from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.files.checks import (
    is_same_file,
    one_line,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.shipped import yaml_file
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.planner.token_exchange import token_seconds, with_token_exchange
from megatron_laer.tools.cli import plan_input
from megatron_laer.tools.cli.argument_types import add_hours, between, named, number, path
from megatron_laer.tools.cli.settings import DEFAULT_CLUSTER, Given, read_recording, settings_of
from megatron_laer.tools.report.recorded import check_same_run
from megatron_laer.tools.report.run_files import metrics_beside, refuse_as_source
from megatron_laer.tools.simulator import estimate
from megatron_laer.tools.simulator.report import (
    LEGEND,
    check_can_plot,
    table_text,
    write_json,
    write_plot,
)
from megatron_laer.tools.simulator.sizes import DEFAULT_SIZES, MAX_WIDTH
from megatron_laer.tools.simulator.table import BASELINES, MODES, TOLERANCE, mean_tokens, simulate

_DEFAULT_TOLERANCE = 0.05

# More ranks than any machine has that trains one model.
_MAX_RANKS = 2**16
# Steps back, and cases: more than any trace has records.
_MAX_STRIDE = 10**9

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace
  %(prog)s traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s routing.csv --experts 64 --cluster my-cluster.yaml --config my-model.yaml --every 97
  %(prog)s --workload W6 --ranks 32 --experts 128 --topk 8
  %(prog)s traces --strategy greedy --mode forecast adaptive --json plan.json --plot plan.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`."""
    parser.description = (
        "What each strategy would have made of a recorded run or of a named workload: balance, "
        "traffic and predicted time of a layer."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    plan_input.add_arguments(parser)
    parser.add_argument(
        "--ranks", type=between(1, _MAX_RANKS), metavar="N", help="default: as in the trace"
    )
    parser.add_argument(
        "--capacity",
        type=between(1, MAX_EXPERTS),
        nargs="+",
        metavar="C",
        help="slots per rank, one or several; default: the recorded, else min(E, ceil(E/N) + 1)",
    )
    parser.add_argument(
        "--node-size",
        type=between(1, _MAX_RANKS),
        metavar="G",
        help="ranks per node; default: the recorded, else the cluster's, at most N",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME|YAML",
        help="hardware constants, a name from configs/clusters or a file; default: the recorded, "
        f"else {DEFAULT_CLUSTER}",
    )
    parser.add_argument(
        "--strategy",
        nargs="+",
        metavar="NAME",
        choices=strategy_names(),
        default=[*BASELINES, *(name for name in strategy_names() if name not in BASELINES)],
        help=f"of {', '.join(strategy_names())}; default: all",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        metavar="MODE",
        choices=MODES,
        default=list(MODES),
        help=f"of {', '.join(MODES)}; default: all",
    )
    parser.add_argument(
        "--tolerance",
        type=number(0, _MAX_RANKS),
        metavar="X",
        help="of mode tolerance: replan where max/mean exceeds 1 + X; "
        f"default: {_DEFAULT_TOLERANCE}",
    )
    parser.add_argument(
        "--lag",
        type=between(1, _MAX_STRIDE),
        default=1,
        metavar="D",
        help="age of the newest counts, in steps of the trace; default: %(default)s",
    )
    parser.add_argument(
        "--restore-algorithm",
        choices=[algorithm.value for algorithm in ExchangeAlgorithm],
        help=f"how experts are fetched; default: the recorded, else {ExchangeAlgorithm.FLAT}",
    )
    parser.add_argument(
        "--token-exchange",
        choices=[choice.value for choice in TokenExchangeChoice],
        help="how tokens travel, for the predicted time; default: the recorded, else "
        f"{TokenExchangeChoice.RANK}",
    )
    parser.add_argument(
        "--recompute",
        choices=[choice.value for choice in Recompute],
        help="what backward computes again, for the predicted time: nothing; all of an MoE layer, "
        f"token exchanges included; or its compute alone; default: the recorded, else "
        f"{Recompute.NONE}",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|YAML",
        help="a model, for its experts' sizes in bf16; default: the recorded, else those of "
        "mixtral-8x7b-e8k2",
    )
    parser.add_argument(
        "--hidden",
        type=between(1, MAX_WIDTH),
        metavar="H",
        help=f"width of a token; default: the model's or the recorded, else {DEFAULT_SIZES.hidden}",
    )
    parser.add_argument(
        "--ffn",
        type=between(1, MAX_WIDTH),
        metavar="F",
        help=f"width of an expert; default: the model's or the recorded, else {DEFAULT_SIZES.ffn}",
    )
    parser.add_argument(
        "--every",
        type=between(1, _MAX_STRIDE),
        default=1,
        metavar="K",
        help="only every K-th microbatch, to be quick; a prime number meets all layers; "
        "default: %(default)s",
    )
    add_hours(parser)
    parser.add_argument("--json", type=path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=path, metavar="FILE", help="plot max/mean - 1 there")


def run(args: argparse.Namespace) -> int:
    """Run `plan`.

    Raises:
        ValueError, OSError, ImportError: what was passed does not work; said before the work where
            it can be known by then.
    """
    metrics = None if args.trace is None else metrics_beside(args.trace)
    _check(args, metrics)
    recording = read_recording(metrics)
    settings = settings_of(_given(args), recording, metrics)
    costs, sizes, cluster = settings.costs, settings.sizes, settings.costs.cluster
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    tolerance = _DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance

    source, recorded = plan_input.read(args, num_experts, _reading)
    if metrics is not None and recording is not None and args.trace_ranks is None:
        check_same_run(metrics, recording.shape, args.trace, recorded)
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    recorded.check_divides(num_ranks)
    geometries, of_shape = settings.geometries(
        num_ranks, recorded.num_experts, args.capacity or [], args.node_size
    )
    from_recording = [*settings.recorded, *of_shape]
    node_size = geometries[0].node_size
    work = estimate.work_of(
        recorded, geometries, args.strategy, args.mode, lag=args.lag, every=args.every
    )
    estimate.check_fits(work, args.hours)
    trace = recorded.with_ranks(num_ranks)
    top_k = min(sizes.top_k, trace.num_experts)
    tokens = mean_tokens(trace, top_k)
    exchange_s = token_seconds(costs, geometries[0], top_k, tokens)
    priced = (
        min(TokenExchange, key=lambda one: exchange_s[one])
        if settings.token_exchange == TokenExchangeChoice.AUTO
        else TokenExchange(settings.token_exchange)
    )
    costs = with_token_exchange(costs, priced, geometries[0], top_k, tokens)
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
        "restore_algorithm": costs.restore_algorithm,
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
    not_asked = " (by default)"
    beside = f"; from {metrics}: {', '.join(from_recording)}" if from_recording else ""
    print(
        one_line(
            f"planned for {num_ranks} ranks in nodes of {node_size} on {cluster.name}"
            f"{not_asked if 'cluster' in settings.defaults else ''}; experts of "
            f"{sizes.hidden} x {sizes.ffn}{'' if sizes.gated else ', not gated'}"
            f"{not_asked if {'hidden', 'ffn'} & {*settings.defaults} else ''}"
            f"{beside}"
        )
    )
    in_words = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in exchange_s.items())
    print(
        f"tokens are priced as they travel by {priced}; expected for even counts, {tokens} tokens "
        f"of top-{top_k} and C = {geometries[0].capacity}: {in_words}",
        end="\n\n",
    )

    rows = simulate(
        trace,
        geometries,
        costs,
        args.strategy,
        args.mode,
        tolerance=tolerance,
        lag=args.lag,
        every=args.every,
        progress=_planning,
    )
    # First of all, or a reader of the table that stops early would end the command before.
    if args.json is not None:
        write_json(args.json, about, rows)
    if args.plot is not None:
        write_plot(args.plot, f"{Path(source).name}, N={num_ranks}, G={node_size}", rows)
    print(table_text(rows))
    print(
        f"\n{rows[0].cases} cases: microbatches of one layer each, with layouts from counts that "
        f"are {args.lag} recorded step(s) old.\nRows of {' and '.join(BASELINES)} are for "
        "comparison, always in mode forecast."
    )
    if trace.num_experts % num_ranks != 0:
        print(f"No row for stock EP, which needs {trace.num_experts} experts / {num_ranks} ranks.")
    print(LEGEND)
    return 0


# Bars show on a terminal only.


def _reading(files: Iterable[Any]) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(files, desc="reading", leave=False, disable=None)
    return bar


def _planning(cases: Sequence[int]) -> Iterable[int]:
    bar: Iterable[int] = tqdm(cases, desc="planning", unit="case", disable=None)
    return bar


# Checks that need no trace.


def _given(args: argparse.Namespace) -> Given:
    restore, recompute, exchange = args.restore_algorithm, args.recompute, args.token_exchange
    return Given(
        args.cluster,
        args.config,
        args.hidden,
        args.ffn,
        None if restore is None else ExchangeAlgorithm(restore),
        None if recompute is None else Recompute(recompute),
        None if exchange is None else TokenExchangeChoice(exchange),
        args.topk,
    )


def _check(args: argparse.Namespace, metrics: Path | None) -> None:
    """Refuse arguments that do not fit each other, or outputs that cannot be written.

    Args:
        metrics: the recording that is read too.

    Raises:
        ValueError, OSError, ImportError: with what was passed and what would work.
    """
    for flag, values in (
        ("--strategy", args.strategy),
        ("--mode", args.mode),
        ("--capacity", args.capacity or []),
    ):
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"{flag} names {twice[0]} twice; leave one out")
    if args.tolerance is not None and TOLERANCE not in args.mode:
        raise ValueError(
            f"--tolerance {args.tolerance}: no effect without --mode {TOLERANCE}; add that mode, "
            "or leave the tolerance out"
        )
    plan_input.check(args)
    inputs = [
        named(f"--{kind}", given, partial(yaml_file, what))
        for kind, what, given in (
            ("cluster", "cluster", args.cluster),
            ("config", "model", args.config),
        )
        if given is not None
    ]
    inputs += [file for file in (args.trace, metrics) if file is not None]
    for flag, output in (("--json", args.json), ("--plot", args.plot)):
        if output is not None:
            refuse_unwritable(output, flag)
            refuse_overwriting(output, inputs, flag)
            if args.trace is not None:
                refuse_as_source(output, args.trace, flag)
    if args.plot is not None:
        check_can_plot(args.plot)
        if args.json is not None and is_same_file(args.json, args.plot):
            raise ValueError(
                f"--json {quoted(args.json)} and --plot {quoted(args.plot)} are one file; give two"
            )
