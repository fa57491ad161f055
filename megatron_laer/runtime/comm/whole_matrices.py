"""`WholeMatrices` puts expert matrices together, each on one rank, and cuts them into slices again.

That is for an optimizer whose updates need whole matrices; what these are is not known here.

Legend: N ranks, E experts, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_laer.planner.sharding import row_bounds

Shape = tuple[int, int, int]


def shares(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Share tasks out among ranks so that their costs are about equal.

    The dearest task goes first, each to the rank with the least so far, in ties to the first one.

    Returns:
        The numbers of each rank's tasks, ascending.
    """
    tasks_N: list[list[int]] = [[] for _ in range(num_ranks)]
    cost_N = [0] * num_ranks
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        rank = cost_N.index(min(cost_N))
        tasks_N[rank].append(task)
        cost_N[rank] += costs[task]
    return [sorted(tasks) for tasks in tasks_N]


class WholeMatrices:
    """Knows which rank gets which matrix of some slices, and makes the exchange in both directions.

    Args:
        shapes_ERK: (E, R, K) for each slice, of the whole matrices; the same on every rank.
        costs: of a matrix of each slice.
        device: of the tensors, which are float32.

    Attributes:
        mine: this rank's matrices, each by the place of its slice and its expert.
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
        """Cut what every rank made of its matrices into slices `[E, r, K]`. Collective.

        Args:
            matrices_RK: in the order of `mine`.
        """
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
        """List (r, K) of what a rank holds of an owner's matrices."""
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
        """Send blocks in the order of ranks, and return those from each rank."""
        # Some rank may have nothing to send.
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
