"""Arguments of `plan`, `simulate` and `advise` for routing: a recorded trace, or a workload."""

from __future__ import annotations

import argparse

from megatron_laer.tools.cli.argument_types import option, path
from megatron_laer.tools.traces.workloads import TITLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        metavar="TRACE",
        nargs="?",
        type=path,
        help="a recording of --fsep-record DIR trace, or its folder",
    )
    titles = ", ".join(f"{name} {title}" for name, title in TITLES.items())
    instead = f"in place of a trace, as in runs, or a stress test of Megatron's benchmark: {titles}"
    option(parser, "--workload W", instead, choices=TITLES)


def check(args: argparse.Namespace, purpose: str) -> None:
    """Refuse both trace and workload, or neither, and a workload without ranks."""
    if args.workload is None:
        if args.trace is None:
            raise ValueError(
                f"nothing to {purpose}: give a TRACE, or --workload with one of {', '.join(TITLES)}"
            )
        return
    given = f"--workload {args.workload}"
    if args.trace is not None:
        raise ValueError(f"both a trace, {str(args.trace)!r}, and {given}; remove one of them")
    if args.ranks is None:
        raise ValueError(f"{given} has no ranks of its own; give --ranks")


def refuse(args: argparse.Namespace, flags: tuple[str, ...], way_out: str) -> None:
    for flag in flags:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{flag} {value}: no effect here; {way_out}, or leave {flag} out")
