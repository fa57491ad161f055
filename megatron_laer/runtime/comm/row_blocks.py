"""`RowBlocks` says which rows of a matrix each rank holds, and pairs them with whole matrices.

Rank J·G + g is local rank g of node J. An exchange inside a node moves, per peer, the rows that one
local rank holds on all nodes together.

Legend: N ranks, G ranks per node, M = N/G nodes, C slots, R rows, r rows of a rank, P rows of a
local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from megatron_laer.planner.sharding import row_bounds


@dataclass(frozen=True)
class RowBlocks:
    """Holds the row blocks of one matrix.

    Attributes:
        bounds_N1: N + 1 bounds of the ranks' blocks.
        node_size: G; N where the whole group counts as one node.
    """

    bounds_N1: tuple[int, ...]
    node_size: int

    @property
    def num_nodes(self) -> int:
        """Return M, the number of nodes of the group."""
        return len(self.rows_GM[0])

    @cached_property
    def rows_GM(self) -> list[list[int]]:
        """Return r of each rank, by local rank and then by node."""
        rows_N = [end - start for start, end in pairwise(self.bounds_N1)]
        return [rows_N[local_rank :: self.node_size] for local_rank in range(self.node_size)]

    @cached_property
    def rows_G(self) -> list[int]:
        """Return P of each local rank."""
        return [sum(rows_M) for rows_M in self.rows_GM]

    @property
    def even(self) -> bool:
        """Whether all ranks hold equally many rows."""
        return self.bounds_N1[-1] % (len(self.bounds_N1) - 1) == 0

    def pairs(
        self, whole_CRK: torch.Tensor, by_local_rank: torch.Tensor, first: int, capacity: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield views of equal shape that hold the same elements of both arrangements.

        Args:
            whole_CRK: whole matrices of some slots, c of them.
            by_local_rank: flat; for each local rank, [capacity, P, K].
            first: which of the `capacity` slots is the first of `whole_CRK`.
            capacity: slots in `by_local_rank`.
        """
        slots, rows, columns = whole_CRK.shape
        nodes, node_size = self.num_nodes, self.node_size
        if self.even:
            block = rows // (nodes * node_size)
            parts = by_local_rank.view(node_size, capacity, nodes, block, columns)
            yield (
                whole_CRK.view(slots, nodes, node_size, block, columns),
                parts[:, first : first + slots].permute(1, 2, 0, 3, 4),
            )
            return
        pieces = by_local_rank.split([capacity * size * columns for size in self.rows_G])
        for local_rank, (piece, size) in enumerate(zip(pieces, self.rows_G, strict=True)):
            part = piece.view(capacity, size, columns)[first : first + slots]
            offset = 0
            for rank in range(local_rank, nodes * node_size, node_size):
                start, end = self.bounds_N1[rank], self.bounds_N1[rank + 1]
                yield whole_CRK[:, start:end], part[:, offset : offset + end - start]
                offset += end - start


@lru_cache(maxsize=256)
def row_blocks(rows: int, num_ranks: int, node_size: int) -> RowBlocks:
    """Make the blocks of a matrix with `rows` rows."""
    return RowBlocks(tuple(row_bounds(rows, num_ranks)), node_size)
