"""Types and options for argparse that several commands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import problem_of, quoted
from megatron_laer.files.shipped import yaml_file
from megatron_laer.planner.layout import MAX_EXPERTS

# More ranks than any machine has that trains one model.
MOST_RANKS = 2**16
MAX_TOKENS = 2**24


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def between(low: int, high: int) -> Callable[[str], int]:

    def parse(text: str) -> int:
        # Not int() alone: it accepts blanks, underscores and digits of other scripts too.
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no integer in {low}..{high}")
        return number

    return parse


def number(low: float, high: float) -> Callable[[str], float]:

    def parse(text: str) -> float:
        # Not float() alone, for the same reasons.
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not low <= value <= high:  # written so that NaN fails
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no number in {low:g}..{high:g}")
        return value

    return parse


def path(text: str) -> Path:
    # To pathlib, the empty text is the current folder.
    if text in ("", "-"):
        given = "'-' is no file here" if text else "the path is empty"
        raise argparse.ArgumentTypeError(f"{given}; give a file")
    return Path(text)


def option(
    parser: argparse._ActionsContainer,
    flag: str,
    text: str,
    kind: Callable[[str], Any] = str,
    **more: Any,
) -> None:
    """Add an option; `flag` may include the name of its value, as in `--ranks N`."""
    name, _, metavar = flag.partition(" ")
    parser.add_argument(name, metavar=metavar or None, help=text, type=kind, **more)


def shared(parser: argparse._ActionsContainer, flag: str, default: str = "", **more: Any) -> None:
    """Add an option of `SHARED`, whose help ends with the command's default."""
    text, kind = SHARED[flag]
    option(parser, flag, f"{text}; default: {default}" if default else text, kind, **more)


def add_force(parser: argparse.ArgumentParser, replaced: str = "a file of other origin") -> None:
    parser.add_argument("--force", action="store_true", help=f"replace {replaced}")


def named[T](flag: str, given: str, load: Callable[[str], T]) -> T:
    """Load a flag's value, and name the flag in errors."""
    try:
        return load(given)
    except (OSError, ValueError) as error:
        raise ValueError(problem_of(flag, given, error)) from error


def yaml_inputs(**given: tuple[str, str | None]) -> list[Path]:
    """Return the YAML files of flags, given as `config=("model", value)`."""
    return [
        named(f"--{flag}", value, partial(yaml_file, kind))
        for flag, (kind, value) in given.items()
        if value is not None
    ]


def refuse_repeated(args: argparse.Namespace, flags: Sequence[str]) -> None:
    for flag in flags:
        values = getattr(args, flag.removeprefix("--").replace("-", "_")) or []
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"{flag} names {twice[0]} twice; remove one of them")


# Options of several commands, with the kinds of their values.
SHARED: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "--ranks N": ("of an FSEP group", between(2, MOST_RANKS)),
    "--node-size G": ("ranks per node", between(1, MOST_RANKS)),
    "--capacity C": ("slots per rank", between(1, MAX_EXPERTS)),
    "--tokens T": ("of a rank in a microbatch", between(1, MAX_TOKENS)),
    "--cluster NAME|YAML": ("hardware constants, a name from configs/clusters or a file", str),
    "--memory-gib X": ("memory that a rank may take", number(1e-3, 1e6)),
    "--json FILE": ("write all figures there", path),
}
