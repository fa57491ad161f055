"""These arguments of `plan` say what is planned for: a recorded trace, or a named workload."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from megatron_laer.files import memory
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools.cli.argument_types import between, path, rank_range
from megatron_laer.tools.report.run_files import naming
from megatron_laer.tools.simulator.estimate import check_drawing
from megatron_laer.tools.traces import FORMATS, read_trace
from megatron_laer.tools.traces.workloads import WORKLOADS, Shape, workload_trace

MAX_TOKENS = 2**24
_MAX_STEPS = 10**5
# Made in 8 bytes and kept in 4.
_BYTES_PER_COUNT = 12
_TRACE_ONLY = {"--format": "format", "--trace-ranks": "trace_ranks"}
_WORKLOAD_ONLY = {"--topk": 2, "--tokens": 4096, "--steps": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of what is planned for to `parser`."""
    add_routing_arguments(parser)
    for flag, high, metavar, told in (
        ("--topk", MAX_EXPERTS, "K", "experts of a token"),
        ("--tokens", MAX_TOKENS, "T", "tokens of a rank"),
        ("--steps", _MAX_STEPS, "M", "steps, of a microbatch each"),
    ):
        parser.add_argument(
            flag,
            type=between(1, high),
            metavar=metavar,
            help=f"of a workload: {told}; default: {_WORKLOAD_ONLY[flag]}",
        )


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the trace, or the workload in its place, to `parser`."""
    parser.add_argument(
        "trace",
        metavar="TRACE",
        nargs="?",
        type=path,
        help="a file or folder: a recording of --fsep-record-trace, the folder of Megatron's "
        "--moe-routing-trace-path, SmartMoE's moe_trace, npz, or CSV",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of the trace; default: what its content tells"
    )
    parser.add_argument(
        "--trace-ranks",
        type=rank_range,
        metavar="FIRST-LAST",
        help="only these ranks of the trace, such as 0-7; default: all",
    )
    parser.add_argument(
        "--experts",
        type=between(1, MAX_EXPERTS),
        metavar="E",
        help="for workloads, and traces that do not say it",
    )
    titles = ", ".join(f"{name} {workload.title}" for name, workload in WORKLOADS.items())
    parser.add_argument(
        "--workload",
        choices=WORKLOADS,
        metavar="W",
        help=f"in place of a trace, one of Megatron's imbalance benchmark: {titles}",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a trace and a workload, neither, and arguments of the one with the other.

    Raises:
        ValueError: with what was passed and what would work.
    """
    if args.workload is None:
        if args.trace is None:
            raise ValueError(
                "nothing to plan for: give a TRACE, or --workload with one of "
                f"{', '.join(WORKLOADS)}"
            )
        for flag in _WORKLOAD_ONLY:
            _refuse(args, flag, flag.removeprefix("--"), "add --workload")
        return
    given = f"--workload {args.workload}"
    if args.trace is not None:
        raise ValueError(f"both a trace, {str(args.trace)!r}, and {given}; leave one out")
    for flag, name in _TRACE_ONLY.items():
        _refuse(args, flag, name, f"{given} reads no file")
    if args.ranks is None:
        raise ValueError(f"{given} has no ranks of its own; give --ranks")
    if args.experts is None and args.config is None:
        raise ValueError(f"{given} has no experts of its own; give --experts or --config")


def read(
    args: argparse.Namespace,
    num_experts: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[str, Trace]:
    """Read or make the trace, and say what it is called.

    Args:
        num_experts: of --experts, or the model's.

    Raises:
        ValueError, OSError: the trace cannot be read, or the workload's sizes do not fit.
    """
    if args.workload is None:
        with naming(args.trace):
            trace = read_trace(
                args.trace,
                args.format,
                ranks=args.trace_ranks,
                num_experts=num_experts,
                progress=progress,
            )
        return str(args.trace), trace
    assert num_experts is not None
    topk, tokens, steps = (
        default if (given := getattr(args, flag.removeprefix("--"))) is None else given
        for flag, default in _WORKLOAD_ONLY.items()
    )
    shape = Shape(args.ranks, num_experts, topk, tokens)
    memory.check_enough(
        _BYTES_PER_COUNT * steps * args.ranks * num_experts,
        f"{steps} steps of {args.ranks} ranks and {num_experts} experts",
        "give fewer --steps",
    )
    check_drawing(steps, Geometry(args.ranks, num_experts, num_experts, 1), args.hours)
    title = WORKLOADS[args.workload].title
    called = f"{args.workload} {title}, top-{topk}, {tokens} tokens per rank"
    return called, workload_trace(args.workload, shape, steps)


def _refuse(args: argparse.Namespace, flag: str, name: str, way_out: str) -> None:
    if (value := getattr(args, name)) is not None:
        raise ValueError(f"{flag} {value}: no effect here; {way_out}, or leave {flag} out")
