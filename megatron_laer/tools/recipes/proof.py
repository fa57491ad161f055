"""Rows of the parity table prove that FSEP equals stock Megatron, for the features that they have.

docs/support.md lists the rows, and `rows` here holds what features each of them has.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from itertools import combinations

from megatron_laer.tools.recipes.features import features_of
from megatron_laer.tools.recipes.rows import ROWS, ProvedRow

_MOST_NAMED = 6


@dataclass(frozen=True)
class Proof:
    """Says which rows have the features of a run, and which features no row has.

    Attributes:
        row: a row that has all features together, or "".
        is_replaced: whether this row, or every row of some feature, runs on a replacement of what
            Megatron has for GPUs alone.
        no_row: features that no row has.
        no_row_together: pairs of other features that no row has together, as `a + b`.
    """

    row: str
    is_replaced: bool
    no_row: tuple[str, ...] = ()
    no_row_together: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in one line, with some of the features and pairs where there are many."""
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
    """Return the proof that rows are of settings that training accepts."""
    features = features_of(settings)
    proving = [row for row in ROWS if features <= row.features]
    if proving:
        # On the real thing where a row is, and then the row that has the least beside.
        row = min(proving, key=lambda row: (row.is_replaced, len(row.features)))
        return Proof(row.name, row.is_replaced)
    rows_of = {name: [row for row in ROWS if name in row.features] for name in sorted(features)}
    pairs = [
        f"{one} + {other}"
        for one, other in combinations([name for name, rows in rows_of.items() if rows], 2)
        if not _has_both(rows_of[one], other)
    ]
    return Proof(
        "",
        any(rows and all(row.is_replaced for row in rows) for rows in rows_of.values()),
        tuple(name for name, rows in rows_of.items() if not rows),
        tuple(pairs),
    )


def _has_both(rows: list[ProvedRow], other: str) -> bool:
    return any(other in row.features for row in rows)


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
