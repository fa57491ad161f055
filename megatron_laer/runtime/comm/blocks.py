"""Row blocks of expert matrices, and the exchanges between slices and blocks of whole experts.

Rank J·G + g is local rank g of node J. An exchange inside a node moves, per peer, the rows that one
local rank holds on all nodes together (`RowBlocks`).

`gather_block` and `scatter_block` convert between slices and stock Megatron's blocks of whole
experts. Unlike restores, these exchanges use neither layouts nor workspaces.

Legend: N ranks, G ranks per node, M = N/G nodes, E experts, X blocks of e experts, C slots. R rows
of a matrix, r rows of a rank, P rows of a local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_laer.planner.placed import row_bounds
from megatron_laer.runtime.comm.process_groups import Group


@dataclass(frozen=True)
class RowBlocks:
    """Row blocks of one matrix.

    Attributes:
        bounds_N1: N + 1 bounds of the ranks' blocks.
        node_size: G; N where the whole group counts as one node.
    """

    bounds_N1: tuple[int, ...]
    node_size: int

    @property
    def num_nodes(self) -> int:
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
        return self.bounds_N1[-1] % (len(self.bounds_N1) - 1) == 0

    def pairs(
        self, whole_CRK: torch.Tensor, by_local_rank: torch.Tensor, first: int, capacity: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield views of equal shape on the same elements of both arrangements.

        Args:
            whole_CRK: whole matrices of slots `first`, `first` + 1, ….
            by_local_rank: flat; for each local rank, [capacity, P, K].
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
    return RowBlocks(tuple(row_bounds(rows, num_ranks)), node_size)


@torch.no_grad()
def gather_block(slice_ErK: torch.Tensor, rows: int, num_blocks: int, group: Group) -> torch.Tensor:
    """Return this rank's block of whole experts, [e, R, K], from all slices. Collective."""
    num_experts, _, columns = slice_ErK.shape
    block_size, num_ranks = num_experts // num_blocks, dist.get_world_size(group)
    shapes = [(block_size, height, columns) for height in _heights(rows, num_ranks)]
    sizes = [block * height * columns for block, height, columns in shapes]
    sent = slice_ErK.reshape(num_blocks, -1).repeat(num_ranks // num_blocks, 1)
    received = slice_ErK.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent.view(-1), sizes, [sent.shape[1]] * num_ranks, group=group)
    parts = zip(received.split(sizes), shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in parts], dim=1)


@torch.no_grad()
def scatter_block(block_eRK: torch.Tensor, slice_ErK: torch.Tensor, group: Group) -> None:
    """Write all ranks' blocks, each from the first rank that has it, to the slices. Collective."""
    block_size, rows, _ = block_eRK.shape
    num_blocks, num_ranks = slice_ErK.shape[0] // block_size, dist.get_world_size(group)
    has_senders = [sender < num_blocks for sender in range(num_ranks)]
    parts = block_eRK.split(_heights(rows, num_ranks), dim=1)
    if not has_senders[dist.get_rank(group)]:
        parts = tuple(part[:0] for part in parts)
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = slice_ErK.numel() // num_blocks
    dist.all_to_all_single(
        slice_ErK.view(-1),
        sent,
        [received * sends for sends in has_senders],
        [part.numel() for part in parts],
        group=group,
    )


def _heights(rows: int, num_ranks: int) -> list[int]:
    bounds = row_bounds(rows, num_ranks)
    return [end - start for start, end in pairwise(bounds)]
