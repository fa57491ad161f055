"""The two exchanges of FSEP: restore whole experts from slices, reduce their gradients to slices.

One All-to-All each over the whole group (`flat`). Does not decide when to run (`experts.module`)
and knows nothing of autograd.

Legend: N ranks, E experts, C slots per rank, S = N·C slots, R rows of a matrix, r rows of the slice
that one rank holds, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_laer.runtime.layout_index import LayoutIndex
from megatron_laer.runtime.process_groups import FSEPGroups


def row_bounds(rows: int, num_ranks: int) -> list[int]:
    """N + 1 bounds of the row blocks that ranks hold; blocks differ by at most one row."""
    return [rank * rows // num_ranks for rank in range(num_ranks + 1)]


@dataclass
class ExchangeCount:
    """What went over the wire, for metrics and for tests of the documented formulas."""

    restores: int = 0
    reduces: int = 0
    restore_bytes: int = 0
    reduce_bytes: int = 0


@dataclass
class FlatExchange:
    """Restore and reduce by one All-to-All over the group.

    A restore receives C·R·K elements of which C·(R - r)·K come from other ranks; a reduce sends as
    many. Neither depends on the layout.
    """

    groups: FSEPGroups
    count: ExchangeCount = field(default_factory=ExchangeCount)

    def restore(self, slice_ErK: torch.Tensor, index: LayoutIndex, rows: int) -> torch.Tensor:
        """Whole experts for this rank's slots.

        Args:
            slice_ErK: this rank's rows of every expert.
            index: the layout to restore.
            rows: R, rows of the whole matrix.

        Returns:
            [C, R, K], expert `slots[c]` of this rank at c.
        """
        num_ranks, capacity = index.layout.num_ranks, index.layout.capacity
        columns = slice_ErK.shape[2]
        bounds = row_bounds(rows, num_ranks)
        send_SrK = slice_ErK.index_select(0, index.slot_expert_S)
        received = [capacity * (end - start) * columns for start, end in pairwise(bounds)]
        sent = [send_SrK.numel() // num_ranks] * num_ranks
        flat = self._all_to_all(send_SrK, received, sent, self.groups.parameters)
        self.count.restore_bytes += self._remote_bytes(flat, received)
        del send_SrK  # before the next allocation
        blocks = [
            block.view(capacity, end - start, columns)
            for block, (start, end) in zip(flat.split(received), pairwise(bounds), strict=True)
        ]
        return torch.cat(blocks, dim=1)

    def reduce(self, grad_CRK: torch.Tensor, index: LayoutIndex) -> torch.Tensor:
        """Gradients of this rank's slice of every expert, summed over the expert's replicas.

        Args:
            grad_CRK: gradients of this rank's restored experts.
            index: the layout they were restored with.

        Returns:
            [E, r, K] in the gradient's dtype, as autograd demands; Megatron adds microbatches in
            float32. The sum over replicas runs in float32 and in slot order.
        """
        num_ranks = index.layout.num_ranks
        capacity, rows, columns = grad_CRK.shape
        bounds = row_bounds(rows, num_ranks)
        mine = bounds[self.groups.rank + 1] - bounds[self.groups.rank]
        blocks = [grad_CRK[:, start:end].reshape(-1) for start, end in pairwise(bounds)]
        sent = [block.numel() for block in blocks]
        received = [capacity * mine * columns] * num_ranks
        flat = self._all_to_all(torch.cat(blocks), received, sent, self.groups.gradients)
        self.count.reduce_bytes += self._remote_bytes(flat, received)
        parts_SrK = flat.view(num_ranks * capacity, mine, columns)

        (_, first_slot_E), *others = index.rounds
        total_ErK = parts_SrK.index_select(0, first_slot_E).float()
        for experts, slots in others:
            total_ErK.index_add_(0, experts, parts_SrK.index_select(0, slots).float())
        return total_ErK.to(grad_CRK.dtype)

    def _all_to_all(
        self, send: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        output = send.new_empty(sum(received))
        dist.all_to_all_single(output, send.reshape(-1), received, sent, group=group)
        return output

    def _remote_bytes(self, flat: torch.Tensor, received: list[int]) -> int:
        return (sum(received) - received[self.groups.rank]) * flat.element_size()
