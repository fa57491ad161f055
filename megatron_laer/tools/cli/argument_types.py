"""Types for argparse refuse a number out of range, an empty path, or a range that is none.

Their messages quote what was given and say what would work. What several commands ask alike is
added here too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from megatron_laer.files.checks import quoted
from megatron_laer.telemetry.trace_records import MAX_RANKS


def between(low: int, high: int) -> Callable[[str], int]:
    """Make a type for integers in a range."""

    def parse(text: str) -> int:
        # Not int(): that takes blanks, underscores and digits of other scripts too.
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no integer in {low}..{high}")
        return number

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Make a type for numbers in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # written so that NaN fails
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no number in {low:g}..{high:g}")
        return value

    return parse


def path(text: str) -> Path:
    """Take a path that is not empty."""
    # To pathlib, no text is the folder that one is in.
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a file")
    return Path(text)


def rank_range(text: str) -> range:
    """Take ranks of a trace as `FIRST-LAST`, both included."""
    first, _, last = text.partition("-")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (first, last)):
        raise argparse.ArgumentTypeError(f"must be two numbers such as 0-7, got {quoted(text)}")
    if not int(first) <= int(last) < MAX_RANKS:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is empty or exceeds {MAX_RANKS - 1}; write FIRST-LAST"
        )
    return range(int(first), int(last) + 1)


def named[T](flag: str, given: str, load: Callable[[str], T]) -> T:
    """Return what `load` makes of a flag's value, which errors name.

    Raises:
        ValueError: in place of an error of `load`.
    """
    try:
        return load(given)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {quoted(given)}: {error}") from error


def add_hours(parser: argparse.ArgumentParser) -> None:
    """Add `--hours`, beyond which a command refuses by an estimate to begin."""
    parser.add_argument(
        "--hours",
        type=number(1e-6, 24.0 * 365),
        default=1.0,
        metavar="X",
        help="refuse what would take longer by a rough estimate; default: %(default)s",
    )
