"""`plan`: a routing trace in, a table of strategies out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from megatron_laer.config import EXCHANGES
from megatron_laer.layout import default_capacity
from megatron_laer.model_flags import model_flags
from megatron_laer.planner.clusters import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.simulator.report import (
    LEGEND,
    check_can_plot,
    table_text,
    write_json,
    write_plot,
)
from megatron_laer.simulator.table import BASELINES, MODES, check_modes, simulate
from megatron_laer.trace import FORMATS, read_trace

_DEFAULT_CLUSTER = "a100-4x8-ib800"
_BYTES_PER_ELEMENT = 2


@dataclass(frozen=True)
class ExpertSizes:
    """The widths of an expert, of which compute, tokens and restores are made."""

    hidden: int
    ffn: int
    gated: bool
    num_experts: int | None = None


# Mixtral-8x7B's experts, as the paper has them.
_DEFAULT_SIZES = ExpertSizes(hidden=4096, ffn=14336, gated=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`."""
    parser.add_argument(
        "trace",
        metavar="TRACE",
        type=Path,
        help="a file or folder: a recording of --fsep-record-trace, the folder of Megatron's "
        "--moe-routing-trace-path, SmartMoE's moe_trace, npz, or CSV",
    )
    parser.add_argument("--format", help=f"{', '.join(FORMATS)}; default: what the content tells")
    parser.add_argument(
        "--trace-ranks",
        metavar="FIRST-LAST",
        help="only these ranks of the trace, such as 0-7; default: all",
    )
    parser.add_argument("--experts", type=int, metavar="E", help="for traces that do not say it")
    parser.add_argument("--ranks", type=int, metavar="N", help="default: as in the trace")
    parser.add_argument(
        "--capacity",
        type=int,
        nargs="+",
        metavar="C",
        help="slots per rank, one or several; default: min(E, ceil(E/N) + 1)",
    )
    parser.add_argument(
        "--node-size", type=int, metavar="G", help="ranks per node; default: the cluster's"
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
        default=["static", "laer", "greedy", "search"],
        help=f"of {', '.join(strategy_names())}; default: all",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        metavar="MODE",
        default=list(MODES),
        help=f"of {', '.join(MODES)}; default: all",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="X",
        help="of mode tolerance: replan where max/mean exceeds 1 + X; default: %(default)s",
    )
    parser.add_argument(
        "--lag",
        type=int,
        default=1,
        metavar="D",
        help="age of the newest counts, in steps of the trace",
    )
    parser.add_argument(
        "--restore-algorithm",
        default=EXCHANGES[0],
        choices=EXCHANGES,
        help="how experts are fetched; default: %(default)s",
    )
    parser.add_argument("--config", metavar="NAME|YAML", help="a model, for its experts' sizes")
    parser.add_argument("--hidden", type=int, metavar="H", help="width of a token")
    parser.add_argument("--ffn", type=int, metavar="F", help="width of a gated expert")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="K",
        help="only every K-th microbatch, to be quick; a prime number meets all layers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot max/mean there")


def run(args: argparse.Namespace) -> int:
    """Run `plan`.

    Raises:
        ValueError, OSError, ImportError: what was passed does not work; said before the work where
            it can be known by then.
    """
    _check_names(args.strategy, args.mode)
    if args.plot is not None:
        check_can_plot()
    for output in (args.json, args.plot):
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"cannot write {str(output)!r}: its folder does not exist")
    cluster = load_cluster(args.cluster)
    sizes = _sizes(args.config, args.hidden, args.ffn)
    costs = CostModel(
        cluster=cluster,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=_BYTES_PER_ELEMENT,
        restore_algorithm=args.restore_algorithm,
    )
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    ranks = None if args.trace_ranks is None else _rank_range(args.trace_ranks)

    recorded = read_trace(
        args.trace, args.format, ranks=ranks, num_experts=num_experts, progress=_reading
    )
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    trace = recorded.with_ranks(num_ranks)
    node_size = min(cluster.ranks_per_node, num_ranks) if args.node_size is None else args.node_size
    capacities = args.capacity or [default_capacity(num_ranks, trace.num_experts)]
    geometries = [
        Geometry(num_ranks, trace.num_experts, capacity, node_size) for capacity in capacities
    ]
    for geometry in geometries:
        check_modes(args.mode, costs, geometry, args.tolerance)
    about = {
        "trace": str(args.trace),
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
        "tolerance": args.tolerance,
        "lag": args.lag,
        "every": args.every,
    }
    print(
        f"{args.trace}: {about['steps']} steps, {about['layers']} layers, {len(trace)} records, "
        f"{trace.num_experts} experts, {recorded.num_ranks} ranks\n"
        f"planned for {num_ranks} ranks in nodes of {node_size} on {cluster.name}; experts of "
        f"{sizes.hidden} x {sizes.ffn}\n"
    )

    rows = simulate(
        trace,
        geometries,
        costs,
        args.strategy,
        args.mode,
        tolerance=args.tolerance,
        lag=args.lag,
        every=args.every,
        progress=_planning,
    )
    print(table_text(rows))
    print(
        f"\n{rows[0].cases} cases: microbatches of one layer each, with layouts from counts that "
        f"are {args.lag} recorded step(s) old.\nRows of {' and '.join(BASELINES)} are for "
        "comparison, always in mode forecast."
    )
    if trace.num_experts % num_ranks != 0:
        print(f"No row for stock EP, which needs {trace.num_experts} experts / {num_ranks} ranks.")
    print(LEGEND)
    if args.json is not None:
        write_json(args.json, about, rows)
    if args.plot is not None:
        write_plot(args.plot, f"{args.trace.name}, N={num_ranks}, G={node_size}", rows)
    return 0


# Bars show on a terminal only.


def _reading(files: Iterable[Any]) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(files, desc="reading", leave=False, disable=None)
    return bar


def _planning(cases: Sequence[int]) -> Iterable[int]:
    bar: Iterable[int] = tqdm(cases, desc="planning", unit="case", disable=None)
    return bar


def _check_names(strategies: Sequence[str], modes: Sequence[str]) -> None:
    for name in strategies:
        if name not in strategy_names():
            raise ValueError(f"unknown strategy {name!r}; use one of {', '.join(strategy_names())}")
    for name in modes:
        if name not in MODES:
            raise ValueError(f"unknown mode {name!r}; use one of {', '.join(MODES)}")
    for names in (strategies, modes):
        if len(set(names)) != len(names):
            raise ValueError(f"{' '.join(names)!r} names one of them twice")


def _rank_range(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and dash and last.isascii() and last.isdigit()):
        raise ValueError(f"--trace-ranks must be two numbers such as 0-7, got {text!r}")
    if not int(first) <= int(last) < 2**20:
        raise ValueError(f"--trace-ranks {text!r} is empty or too large; write FIRST-LAST")
    return list(range(int(first), int(last) + 1))


def _sizes(config: str | None, hidden: int | None, ffn: int | None) -> ExpertSizes:
    sizes = _DEFAULT_SIZES if config is None else _model_sizes(config)
    given = ExpertSizes(
        sizes.hidden if hidden is None else hidden,
        sizes.ffn if ffn is None else ffn,
        sizes.gated,
        sizes.num_experts,
    )
    if given.hidden < 1 or given.ffn < 1:
        raise ValueError(f"--hidden and --ffn must be at least 1, got {hidden} and {ffn}")
    return given


def _model_sizes(config: str) -> ExpertSizes:
    flags = model_flags(config)
    values = {
        flag: value
        for flag, value in zip(flags, [*flags[1:], "--"], strict=True)
        if flag.startswith("--")
    }
    sizes = {}
    for name, flag in (
        ("hidden", "--hidden-size"),
        ("ffn", "--moe-ffn-hidden-size"),
        ("num_experts", "--num-experts"),
    ):
        if flag == "--moe-ffn-hidden-size" and flag not in values:
            flag = "--ffn-hidden-size"
        text = values.get(flag, "")
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise ValueError(
                f"model {config!r} has no usable {flag.removeprefix('--')} ({text!r}); give "
                "--hidden and --ffn instead of --config"
            )
        sizes[name] = int(text)
    return ExpertSizes(sizes["hidden"], sizes["ffn"], "--swiglu" in flags, sizes["num_experts"])
