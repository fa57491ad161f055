"""Row blocks of expert matrices, and two exchanges between slices and whole matrices.

Rank J·G + g is local rank g of node J. An exchange inside a node moves, per peer, the rows that one
local rank holds on all nodes together (`RowBlocks`).

`gather_block` and `scatter_block` convert between slices and stock Megatron's blocks of whole
experts. `WholeMatrices` assembles each matrix on one rank, for optimizers that need it whole.
Unlike restores, these exchanges use neither layouts nor workspaces.

Legend: N ranks, G ranks per node, M = N/G nodes, E experts, X blocks of e experts, C slots. R rows
of a matrix, r rows of a rank, P rows of a local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_laer.planner.sharding import row_bounds
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


Shape = tuple[int, int, int]


def shares(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assign tasks to ranks at about equal cost; return each rank's tasks, ascending.

    The costliest task goes first, each to the rank with the least cost so far, in ties to the
    first.
    """
    tasks_N: list[list[int]] = [[] for _ in range(num_ranks)]
    cost_N = [0] * num_ranks
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        rank = cost_N.index(min(cost_N))
        tasks_N[rank].append(task)
        cost_N[rank] += costs[task]
    return [sorted(tasks) for tasks in tasks_N]


class WholeMatrices:
    """Assignment of whole float32 matrices to ranks, and the exchange in both directions.

    Args:
        shapes_ERK: (E, R, K) of each slice's whole matrices; the same on every rank.
        costs: of a matrix of each slice.

    Attributes:
        mine: this rank's matrices, each as the position of its slice and its expert.
    """

    def __init__(
        self,
        shapes_ERK: Sequence[Shape],
        costs: Sequence[int],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._nothing = torch.empty(0, device=device, dtype=torch.float32)
        self._group, self._rank, self._ranks = group, group.rank(), range(group.size())
        self._shapes_ERK = shapes_ERK
        self._bounds = [row_bounds(rows, group.size()) for _, rows, _ in shapes_ERK]
        matrices = [
            (at, e) for at, (experts, _, _) in enumerate(shapes_ERK) for e in range(experts)
        ]
        self._matrices_N = [
            [matrices[task] for task in tasks]
            for tasks in shares([costs[at] for at, _ in matrices], group.size())
        ]
        self.mine = self._matrices_N[self._rank]

    def gather(self, slices_ErK: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's matrices `[R, K]`, in the order of `mine`. Collective."""
        sent = [slices_ErK[at][expert] for matrices in self._matrices_N for at, expert in matrices]
        blocks_N = self._exchange(
            sent,
            sent_shapes=[self._shapes(owner, rows_of=self._rank) for owner in self._ranks],
            shapes=[self._shapes(self._rank, rows_of=rank) for rank in self._ranks],
        )
        return [torch.cat(blocks) for blocks in zip(*blocks_N, strict=True)]

    def scatter(self, matrices_RK: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Split all ranks' matrices, in the order of `mine`, into `[E, r, K]`. Collective."""
        sent = [
            matrix_RK[self._bounds[at][rank] : self._bounds[at][rank + 1]]
            for rank in self._ranks
            for (at, _), matrix_RK in zip(self.mine, matrices_RK, strict=True)
        ]
        blocks_N = self._exchange(
            sent,
            sent_shapes=[self._shapes(self._rank, rows_of=rank) for rank in self._ranks],
            shapes=[self._shapes(owner, rows_of=self._rank) for owner in self._ranks],
        )
        block_of = {
            matrix: block
            for matrices, blocks in zip(self._matrices_N, blocks_N, strict=True)
            for matrix, block in zip(matrices, blocks, strict=True)
        }
        return [
            torch.stack([block_of[at, expert] for expert in range(experts)])
            for at, (experts, _, _) in enumerate(self._shapes_ERK)
        ]

    def _shapes(self, owner: int, *, rows_of: int) -> list[tuple[int, int]]:
        return [
            (self._bounds[at][rows_of + 1] - self._bounds[at][rows_of], self._shapes_ERK[at][2])
            for at, _ in self._matrices_N[owner]
        ]

    def _exchange(
        self,
        sent: Sequence[torch.Tensor],
        sent_shapes: Sequence[Sequence[tuple[int, int]]],
        shapes: Sequence[Sequence[tuple[int, int]]],
    ) -> list[list[torch.Tensor]]:
        # A rank may have nothing to send.
        flat = torch.cat([self._nothing, *(block.reshape(-1) for block in sent)])
        sizes, sent_sizes = (
            [sum(rows * columns for rows, columns in blocks) for blocks in of_ranks]
            for of_ranks in (shapes, sent_shapes)
        )
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, sent_sizes, group=self._group)
        return [
            [
                block.view(shape)
                for block, shape in zip(
                    piece.split([rows * columns for rows, columns in blocks]), blocks, strict=True
                )
            ]
            for piece, blocks in zip(received.split(sizes), shapes, strict=True)
        ]
