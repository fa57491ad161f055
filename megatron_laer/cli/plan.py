"""The command `plan` prints what each strategy would have made of a recorded run or a workload."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_laer.choices import Recompute, TokenExchange, TokenExchangeChoice
from megatron_laer.cli import plan_input
from megatron_laer.cli.argument_types import add_hours, between, number, path
from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.files.checks import (
    is_same_file,
    one_line,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.shipped import yaml_file
from megatron_laer.layout import MAX_EXPERTS, default_capacity
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.planner.token_exchange import token_seconds, with_token_exchange
from megatron_laer.simulator import estimate
from megatron_laer.simulator.report import (
    LEGEND,
    check_can_plot,
    table_text,
    write_json,
    write_plot,
)
from megatron_laer.simulator.sizes import DEFAULT_SIZES, MAX_WIDTH, ExpertSizes, model_sizes
from megatron_laer.simulator.table import BASELINES, MODES, TOLERANCE, simulate
from megatron_laer.trace import Trace

_BYTES_PER_ELEMENT = 2

_DEFAULT_CLUSTER = "a100-4x8-ib800"
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
        help="slots per rank, one or several; default: min(E, ceil(E/N) + 1)",
    )
    parser.add_argument(
        "--node-size",
        type=between(1, _MAX_RANKS),
        metavar="G",
        help="ranks per node; default: the cluster's, at most N",
    )
    parser.add_argument(
        "--cluster",
        default=_DEFAULT_CLUSTER,
        metavar="NAME|YAML",
        help="hardware constants, a name from configs/clusters or a file; default: %(default)s",
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
        default=ExchangeAlgorithm.FLAT.value,
        choices=[algorithm.value for algorithm in ExchangeAlgorithm],
        help="how experts are fetched; default: %(default)s",
    )
    parser.add_argument(
        "--token-exchange",
        default=TokenExchangeChoice.RANK.value,
        choices=[choice.value for choice in TokenExchangeChoice],
        help="how tokens travel, for the predicted time; default: %(default)s",
    )
    parser.add_argument(
        "--recompute",
        default=Recompute.NONE.value,
        choices=[choice.value for choice in Recompute],
        help="what backward computes again, for the predicted time: nothing; all of an MoE layer, "
        "token exchanges included; or its compute alone; default: %(default)s",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|YAML",
        help="a model, for its experts' sizes; default: those of mixtral-8x7b-e8k2",
    )
    parser.add_argument(
        "--hidden",
        type=between(1, MAX_WIDTH),
        metavar="H",
        help=f"width of a token; default: the model's, {DEFAULT_SIZES.hidden} without --config",
    )
    parser.add_argument(
        "--ffn",
        type=between(1, MAX_WIDTH),
        metavar="F",
        help=f"width of an expert; default: the model's, {DEFAULT_SIZES.ffn} without --config",
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
    _check(args)
    cluster = _named("--cluster", args.cluster, load_cluster)
    sizes = _expert_sizes(args)
    costs = CostModel(
        cluster=cluster,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=_BYTES_PER_ELEMENT,
        recompute=Recompute(args.recompute),
        restore_algorithm=ExchangeAlgorithm(args.restore_algorithm),
    )
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    tolerance = _DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance

    source, recorded = plan_input.read(args, num_experts, _reading)
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    geometries = _geometries(args, recorded, num_ranks, cluster)
    node_size = geometries[0].node_size
    work = estimate.work_of(
        recorded, geometries, args.strategy, args.mode, lag=args.lag, every=args.every
    )
    estimate.check_fits(work, args.hours)
    trace = recorded.with_ranks(num_ranks)
    top_k = min(sizes.top_k, trace.num_experts)
    tokens = max(1, int(trace.counts_RNE.sum(dtype=np.int64)) // (len(trace) * num_ranks * top_k))
    exchange_s = token_seconds(costs, geometries[0], top_k, tokens)
    exchange = TokenExchangeChoice(args.token_exchange)
    priced = (
        min(TokenExchange, key=lambda one: exchange_s[one])
        if exchange == TokenExchangeChoice.AUTO
        else TokenExchange(exchange)
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
        "restore_algorithm": args.restore_algorithm,
        "recompute": args.recompute,
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
    print(
        one_line(
            f"planned for {num_ranks} ranks in nodes of {node_size} on {cluster.name}; experts of "
            f"{sizes.hidden} x {sizes.ffn}{'' if sizes.gated else ', not gated'}"
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


def _geometries(
    args: argparse.Namespace, recorded: Trace, num_ranks: int, cluster: Cluster
) -> list[Geometry]:
    """Return the shapes that are asked for, one per capacity.

    Raises:
        ValueError: an argument that does not fit the trace, by its flag.
    """
    recorded.check_divides(num_ranks)
    num_experts = recorded.num_experts
    node_size, given = args.node_size, "--node-size"
    if node_size is None:
        node_size = min(cluster.ranks_per_node, num_ranks)
        given = f"--node-size is not given, and {cluster.name} has nodes of"
    if num_ranks % node_size != 0:
        works = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ValueError(
            f"{given} {node_size}, which does not divide the {num_ranks} ranks; use one of {works}"
        )
    least = -(-num_experts // num_ranks)
    for capacity in args.capacity or []:
        if not least <= capacity <= num_experts:
            raise ValueError(
                f"--capacity {capacity}: {num_ranks} ranks need {least}..{num_experts} slots each "
                f"for {num_experts} experts"
            )
    capacities = args.capacity or [default_capacity(num_ranks, num_experts)]
    return [Geometry(num_ranks, num_experts, capacity, node_size) for capacity in capacities]


# Checks that need no trace.


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not fit each other, or outputs that cannot be written.

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
    inputs = [_named("--cluster", args.cluster, partial(yaml_file, "cluster"))]
    if args.trace is not None:
        inputs.append(args.trace)
    if args.config is not None:
        inputs.append(_named("--config", args.config, partial(yaml_file, "model")))
    for flag, output in (("--json", args.json), ("--plot", args.plot)):
        if output is not None:
            refuse_unwritable(output, flag)
            refuse_overwriting(output, inputs, flag)
    if args.plot is not None:
        check_can_plot(args.plot)
        if args.json is not None and is_same_file(args.json, args.plot):
            raise ValueError(
                f"--json {quoted(args.json)} and --plot {quoted(args.plot)} are one file; give two"
            )


def _expert_sizes(args: argparse.Namespace) -> ExpertSizes:
    """Return an expert's widths: of the model in --config, unless --hidden and --ffn differ.

    Raises:
        ValueError: a model that cannot be read, or does not say them.
    """
    sizes = DEFAULT_SIZES
    if args.config is not None:
        sizes = _named("--config", args.config, model_sizes)
    return ExpertSizes(
        sizes.hidden if args.hidden is None else args.hidden,
        sizes.ffn if args.ffn is None else args.ffn,
        sizes.gated,
        sizes.num_experts,
        sizes.top_k if args.topk is None else args.topk,
    )


def _named[T](flag: str, given: str, load: Callable[[str], T]) -> T:
    """Return what `load` makes of a flag's value, which errors name."""
    try:
        return load(given)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {quoted(given)}: {error}") from error
