"""Reader of CSV tables with a header, which checks every value; it knows no particular table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import quoted, read_text

# The largest table of the artifact has three megabytes.
MAX_BYTES = 2**25
_MOST = 1e12

Take = Callable[[str], Any]


def text(given: str) -> str:
    """Parse a name; raise ValueError for one that is empty or unprintable."""
    if not given or not given.isprintable():
        raise ValueError("must be a name")
    return given


def positive(given: str) -> float:
    return _number(given, math.ulp(0.0), "a number above 0")


def not_negative(given: str) -> float:
    return _number(given, 0.0, "a number of at least 0")


def below(end: int) -> Take:
    """Make a parser of whole numbers from 0 to below `end`."""

    def take(given: str) -> int:
        if not (given.isascii() and given.isdigit() and len(given) < 19 and int(given) < end):
            raise ValueError(f"must be a whole number in 0..{end - 1}")
        return int(given)

    return take


def read_rows(
    path: Path, columns: Mapping[str, Take], key: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Read columns of a table, which may have others.

    `columns` has a parser by name, which raises ValueError for a bad value. No two rows may have
    the same values in the columns `key`.

    Raises ValueError with the file, the line and the value.
    """
    reader = csv.reader(io.StringIO(read_text(path, MAX_BYTES), newline=""), strict=True)
    try:
        found = list(_rows(path, reader, columns, key))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    if not found:
        raise ValueError(f"{path}: the table holds no rows")
    return found


def _rows(
    path: Path, lines: Any, columns: Mapping[str, Take], key: Sequence[str]
) -> Iterator[dict[str, Any]]:
    header = next(lines, [])
    for name in columns:
        if header.count(name) != 1:
            raise ValueError(
                f"{path}, line 1: the columns are {quoted(','.join(header))}, expected one {name!r}"
            )
    at = {name: header.index(name) for name in columns}
    seen = set()
    for values in lines:
        where = f"{path}, line {lines.line_num}"
        if len(values) != len(header):
            raise ValueError(f"{where}: {len(values)} values, expected {len(header)}")
        row = {}
        for name, take in columns.items():
            try:
                row[name] = take(values[at[name]])
            except ValueError as error:
                raise ValueError(
                    f"{where}: {name} {error}, got {quoted(values[at[name]])}"
                ) from error
        if key:
            named = tuple(row[name] for name in key)
            if named in seen:
                told = ", ".join(f"{name} {row[name]}" for name in key)
                raise ValueError(f"{where}: {told} is there twice; remove one of them")
            seen.add(named)
        yield row


def _number(given: str, least: float, kind: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not least <= value <= _MOST:  # written so that NaN fails
        raise ValueError(f"must be {kind}, at most {_MOST:g}")
    return value
