"""The arguments of `plan` are defined here, and refused before a trace is read.

Nothing here depends on the trace; what does, `command` checks when the trace is known.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.files import is_same_file, quoted, refuse_overwriting, refuse_unwritable
from megatron_laer.layout import MAX_EXPERTS
from megatron_laer.model_flags import model_flags
from megatron_laer.planner.clusters import Cluster, load_cluster
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.shipped import yaml_file
from megatron_laer.simulator.report import check_can_plot
from megatron_laer.simulator.table import MODES, TOLERANCE
from megatron_laer.trace import FORMATS
from megatron_laer.trace.records import MAX_RANKS as MAX_TRACE_RANKS

DEFAULT_CLUSTER = "a100-4x8-ib800"
DEFAULT_TOLERANCE = 0.05

# More ranks than any machine has that trains one model.
MAX_RANKS = 2**16
# A hundred times that of the widest models; products of two, in bytes, stay far below 2**63.
MAX_WIDTH = 2**20
# Steps back, and cases: more than any trace has records.
MAX_STRIDE = 10**9
_LEAST_HOURS, _MAX_HOURS = 1e-6, 24.0 * 365


@dataclass(frozen=True)
class ExpertSizes:
    """Holds the widths of an expert, which compute, tokens and restores follow from."""

    hidden: int
    ffn: int
    gated: bool
    num_experts: int | None = None


# Mixtral-8x7B's experts, as the paper has them.
_DEFAULT_SIZES = ExpertSizes(hidden=4096, ffn=14336, gated=True)

EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace
  %(prog)s traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s routing.csv --experts 64 --cluster my-cluster.yaml --config my-model.yaml --every 97
  %(prog)s traces --strategy greedy --mode forecast adaptive --json plan.json --plot plan.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "trace",
        metavar="TRACE",
        type=_path,
        help="a file or folder: a recording of --fsep-record-trace, the folder of Megatron's "
        "--moe-routing-trace-path, SmartMoE's moe_trace, npz, or CSV",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of the trace; default: what its content tells"
    )
    parser.add_argument(
        "--trace-ranks",
        type=_rank_range,
        metavar="FIRST-LAST",
        help="only these ranks of the trace, such as 0-7; default: all",
    )
    parser.add_argument(
        "--experts",
        type=between(1, MAX_EXPERTS),
        metavar="E",
        help="for traces that do not say it",
    )
    parser.add_argument(
        "--ranks", type=between(1, MAX_RANKS), metavar="N", help="default: as in the trace"
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
        type=between(1, MAX_RANKS),
        metavar="G",
        help="ranks per node; default: the cluster's, at most N",
    )
    parser.add_argument(
        "--cluster",
        default=DEFAULT_CLUSTER,
        metavar="NAME|YAML",
        help="hardware constants, a name from configs/clusters or a file; default: %(default)s",
    )
    parser.add_argument(
        "--strategy",
        nargs="+",
        metavar="NAME",
        choices=strategy_names(),
        default=["static", "laer", "greedy", "search"],
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
        type=_number(0, MAX_RANKS),
        metavar="X",
        help="of mode tolerance: replan where max/mean exceeds 1 + X; "
        f"default: {DEFAULT_TOLERANCE}",
    )
    parser.add_argument(
        "--lag",
        type=between(1, MAX_STRIDE),
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
        "--config",
        metavar="NAME|YAML",
        help="a model, for its experts' sizes; default: those of mixtral-8x7b-e8k2",
    )
    parser.add_argument(
        "--hidden",
        type=between(1, MAX_WIDTH),
        metavar="H",
        help=f"width of a token; default: the model's, {_DEFAULT_SIZES.hidden} without --config",
    )
    parser.add_argument(
        "--ffn",
        type=between(1, MAX_WIDTH),
        metavar="F",
        help=f"width of an expert; default: the model's, {_DEFAULT_SIZES.ffn} without --config",
    )
    parser.add_argument(
        "--every",
        type=between(1, MAX_STRIDE),
        default=1,
        metavar="K",
        help="only every K-th microbatch, to be quick; a prime number meets all layers; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--hours",
        type=_number(_LEAST_HOURS, _MAX_HOURS),
        default=1.0,
        metavar="X",
        help="refuse what would take longer by a rough estimate; default: %(default)s",
    )
    parser.add_argument("--json", type=_path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=_path, metavar="FILE", help="plot max/mean - 1 there")


def between(low: int, high: int) -> Callable[[str], int]:
    """Make a type for argparse: an integer in a range."""

    def parse(text: str) -> int:
        # Not int(): that takes blanks, underscores and digits of other scripts too.
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no integer in {low}..{high}")
        return number

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    """Make a type for argparse: a number in a range."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:  # written so that NaN fails
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no number in {low:g}..{high:g}")
        return number

    return parse


def _path(text: str) -> Path:
    # To pathlib, no text is the folder that one is in.
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a file")
    return Path(text)


def _rank_range(text: str) -> range:
    first, _, last = text.partition("-")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (first, last)):
        raise argparse.ArgumentTypeError(f"must be two numbers such as 0-7, got {quoted(text)}")
    if not int(first) <= int(last) < MAX_TRACE_RANKS:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is empty or exceeds {MAX_TRACE_RANKS - 1}; write FIRST-LAST"
        )
    return range(int(first), int(last) + 1)


def check(args: argparse.Namespace) -> None:
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
    inputs = [args.trace, _named("--cluster", args.cluster, partial(yaml_file, "cluster"))]
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


def cluster(args: argparse.Namespace) -> Cluster:
    """Return the hardware of --cluster.

    Raises:
        ValueError: it cannot be read, or does not fit.
    """
    return _named("--cluster", args.cluster, load_cluster)


def expert_sizes(args: argparse.Namespace) -> ExpertSizes:
    """Return an expert's widths: of the model in --config, unless --hidden and --ffn differ.

    Raises:
        ValueError: a model that cannot be read, or does not say them.
    """
    sizes = _DEFAULT_SIZES
    if args.config is not None:
        sizes = _named("--config", args.config, _model_sizes)
    return ExpertSizes(
        sizes.hidden if args.hidden is None else args.hidden,
        sizes.ffn if args.ffn is None else args.ffn,
        sizes.gated,
        sizes.num_experts,
    )


def _named[T](flag: str, given: str, load: Callable[[str], T]) -> T:
    """Return what `load` makes of a flag's value, which errors name."""
    try:
        return load(given)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {quoted(given)}: {error}") from error


def _model_sizes(config: str) -> ExpertSizes:
    # Megatron takes both spellings of a flag.
    flags = [word.replace("_", "-") for word in model_flags(config)]
    values = {
        flag: value
        for flag, value in zip(flags, [*flags[1:], "--"], strict=True)
        if flag.startswith("--")
    }

    def size(flag: str, most: int) -> int:
        text = values.get(flag, "")
        if not (text.isascii() and text.isdigit() and len(text) < 19 and 1 <= int(text) <= most):
            raise ValueError(
                f"has no {flag.removeprefix('--')} in 1..{most}, but {quoted(text)}; mend it, or "
                "give --hidden and --ffn instead of --config"
            )
        return int(text)

    own_ffn = "--moe-ffn-hidden-size"
    return ExpertSizes(
        size("--hidden-size", MAX_WIDTH),
        size(own_ffn if own_ffn in values else "--ffn-hidden-size", MAX_WIDTH),
        any(flag in values for flag in _GATED),
        size("--num-experts", MAX_EXPERTS),
    )


# Megatron's flags for activations that multiply two halves of the first matrix's output.
_GATED: Sequence[str] = ("--swiglu", "--quick-geglu")
