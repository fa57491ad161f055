"""Which rows of a matrix lie on which rank, and copies between whole matrices and such blocks.

Ranks are numbered through spans of G (nodes, or the whole group): rank = J·G + g, span J, place g.
An exchange inside a span moves, per peer, the rows of a *place*: those of rank g of every span.

Legend: N ranks, G ranks per span, M = N/G spans, C slots, R rows, r rows of a rank, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from megatron_laer.sharding import row_bounds


@dataclass(frozen=True)
class RowBlocks:
    """The row blocks of one matrix.

    Attributes:
        bounds_N1: N + 1 bounds of the ranks' blocks.
        span: G.
    """

    bounds_N1: tuple[int, ...]
    span: int

    @property
    def num_spans(self) -> int:
        """M."""
        return len(self.rows_GM[0])

    @cached_property
    def rows_GM(self) -> list[list[int]]:
        """r of each rank, by place and then by span."""
        rows_N = [end - start for start, end in pairwise(self.bounds_N1)]
        return [rows_N[place :: self.span] for place in range(self.span)]

    @cached_property
    def place_rows_G(self) -> list[int]:
        """Rows that rank g of every span hold together."""
        return [sum(rows_M) for rows_M in self.rows_GM]

    @property
    def even(self) -> bool:
        """Whether all ranks hold equally many rows."""
        return self.bounds_N1[-1] % (len(self.bounds_N1) - 1) == 0

    def pairs(
        self, whole_CRK: torch.Tensor, by_place: torch.Tensor, first: int, capacity: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of equal shape that hold the same elements of both arrangements.

        Args:
            whole_CRK: whole matrices of some slots, c of them.
            by_place: flat; for each place, [capacity, rows of the place, K].
            first: which of the `capacity` slots is the first of `whole_CRK`.
            capacity: slots in `by_place`.
        """
        slots, rows, columns = whole_CRK.shape
        spans, span = self.num_spans, self.span
        if self.even:
            block = rows // (spans * span)
            parts = by_place.view(span, capacity, spans, block, columns)[:, first : first + slots]
            yield (
                whole_CRK.view(slots, spans, span, block, columns),
                parts.permute(1, 2, 0, 3, 4),
            )
            return
        sizes = self.place_rows_G
        pieces = by_place.split([capacity * size * columns for size in sizes])
        for place, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            part = piece.view(capacity, size, columns)[first : first + slots]
            offset = 0
            for rank in range(place, spans * span, span):
                start, end = self.bounds_N1[rank], self.bounds_N1[rank + 1]
                yield whole_CRK[:, start:end], part[:, offset : offset + end - start]
                offset += end - start


@lru_cache(maxsize=256)
def row_blocks(rows: int, num_ranks: int, span: int) -> RowBlocks:
    """The blocks of a matrix with `rows` rows."""
    return RowBlocks(tuple(row_bounds(rows, num_ranks)), span)
