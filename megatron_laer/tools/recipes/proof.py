"""Proof by rows of the parity table that FSEP equals stock Megatron, for their features.

docs/support.md lists the rows. `python -m tests.proved_rows` writes their features to
`proved_rows.csv`.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from megatron_laer.tools.recipes.features import features_of

FILE = Path(__file__).with_name("proved_rows.csv")

_MOST_NAMED = 6


class ProvedRow(NamedTuple):
    """Row of the parity table; `is_replaced` means that it replaces parts that need a GPU."""

    name: str
    features: frozenset[str]
    is_replaced: bool


@cache
def proved_rows() -> tuple[ProvedRow, ...]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(
            ProvedRow(name, frozenset(filter(None, features.split(", "))), bool(replaced))
            for name, features, replaced in csv.reader(file)
        )


@dataclass(frozen=True)
class Proof:
    """The row that has all features of a run together, or "", and features that no row has.

    `is_replaced` says that it, or every row of some feature, replaces parts that Megatron has for
    GPUs alone. `no_row_together` has pairs of other features, as `a + b`.
    """

    row: str
    is_replaced: bool
    no_row: tuple[str, ...] = ()
    no_row_together: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line, which abbreviates long lists of features and pairs."""
        where = "on the CPU"
        if self.is_replaced:
            where += ", where replacements stand for what Megatron has for GPUs alone"
        if self.row:
            return f"proved by row '{self.row}' {where}"
        said = "each feature proved by a row "
        if self.no_row:
            said = f"no row has {_some(self.no_row)}; each other feature proved by a row "
        pairs = len(self.no_row_together)
        together = f"{pairs} {'pair' if pairs == 1 else 'pairs'} of them without a row: "
        together = together + _some(self.no_row_together) if pairs else "no row has all of them"
        return f"{said}{where}; {together}"


def proof_of(settings: Namespace) -> Proof:
    """Return the proof by rows for settings that training accepts."""
    features = features_of(settings)
    proving = [row for row in proved_rows() if features <= row.features]
    if proving:
        # Prefer a row without replacements, then the row with the fewest other features.
        row = min(proving, key=lambda row: (row.is_replaced, len(row.features)))
        return Proof(row.name, row.is_replaced)
    rows_of = {
        name: [row for row in proved_rows() if name in row.features] for name in sorted(features)
    }
    pairs = [
        f"{one} + {other}"
        for one, other in combinations([name for name, rows in rows_of.items() if rows], 2)
        if not any(other in row.features for row in rows_of[one])
    ]
    return Proof(
        "",
        any(rows and all(row.is_replaced for row in rows) for rows in rows_of.values()),
        tuple(name for name, rows in rows_of.items() if not rows),
        tuple(pairs),
    )


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
