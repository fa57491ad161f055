"""Relay: homes spread their replicated experts by rows, and ranks restore replicas from those.

After the spread every rank has its rows of each replicated expert, as with `--fsep-sharding rows`
of all experts. So the second hop is that exchange, and a home sends one expert's bytes for each of
its replicated experts, however many replicas they have. Gradients go the same way back.

Legend: N ranks, C replica slots per rank, h home experts of a rank, X replicated experts of all
ranks, x of one. R rows of a matrix, r rows of a rank, K columns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.workspace import relay_workspace
from megatron_laer.runtime.comm.blocks import row_blocks
from megatron_laer.runtime.comm.buffers import Buffers, MatrixBuffers
from megatron_laer.runtime.comm.exchange import (
    Exchange,
    HierarchicalExchange,
    ReusableWeights,
    result_of_restore,
)
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.rows import pack_rows
from megatron_laer.runtime.comm.stages import whole_group
from megatron_laer.runtime.comm.steps import Steps


class RelayExchange(Exchange):
    """Restores and reduces of replicas by way of row blocks, in front of `rows`' exchange."""

    def __init__(self, groups: FSEPGroups, of_rows: HierarchicalExchange) -> None:
        self.count = of_rows.count
        self._rank, self._num_ranks = groups.rank, groups.size
        self._of_rows = of_rows
        self._restore_stage = whole_group(groups, groups.parameters)
        self._reduce_stage = whole_group(groups, groups.gradients)

    @property
    def communicators(self) -> tuple[Group, ...]:
        return (self._restore_stage.group, self._reduce_stage.group, *self._of_rows.communicators)

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        self._of_rows.prepare_restore(index, before)

    def prepare_reduce(self, index: LayoutIndex) -> None:
        self._of_rows.prepare_reduce(index)

    def restore_steps(
        self,
        homes_hRK: Sequence[torch.Tensor],
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        """Fetch the experts of this rank's replica slots, as `DirectExchange` does."""
        out_CRK = result_of_restore(homes_hRK, index, rows, reuse, out)
        needed = self._of_rows.restore_index_of(index, None if reuse is None else reuse.index)
        if needed.has_work:
            with self._of_rows.restore_workspace.lent() as lent:
                slice_XrK = yield from self._spread(lent, index, needed.experts, homes_hRK, out_CRK)
                yield from self._of_rows.restore_rows(needed, index, slice_XrK, out_CRK)
        return out_CRK

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: Sequence[torch.Tensor] | None = None,
    ) -> Steps:
        """Sum the gradients of this rank's home experts over their replicas.

        Sums run in float32 and in slot order, and go home in the wire's dtype. Arguments and result
        are those of `DirectExchange`.
        """
        grad_CRK = grad_CRK.contiguous()
        experts = self._of_rows.reduce_index_of(index).experts
        wire = self._of_rows.wire_dtype_of(grad_CRK, wire_dtype)
        hop = self._hop(experts, index, grad_CRK)
        shape = (len(experts), *self._of_rows.own_rows_of(grad_CRK))
        with self._of_rows.reduce_workspace.lent() as lent:
            buffers = self._buffers(lent, index, grad_CRK, wire.itemsize)
            sums_XrK = buffers.take("rows", shape, wire)
            yield from self._of_rows.reduce_rows(index, grad_CRK, sums_XrK, wire, adds=False)
            received = buffers.take("homes", (sum(hop.of_ranks),), wire)
            moved = yield from self._reduce_stage.all_to_all(
                received, sums_XrK.view(-1), hop.of_ranks, hop.of_homes
            )
            self.count.add_reduce(*moved)
            sums_hRK = None
            if add_to is None:
                num_homes = index.placed.geometry.home_slots
                sums_hRK = grad_CRK.new_zeros((num_homes, *grad_CRK.shape[1:]))
                add_to = sums_hRK.unbind()
            blocks = row_blocks(grad_CRK.shape[1], self._num_ranks, self._num_ranks)
            for at, home in enumerate(hop.mine):
                for whole, part in blocks.pairs(add_to[home][None], received, at, len(hop.mine)):
                    whole.add_(part)
        return add_to[0] if sums_hRK is None else sums_hRK

    def _spread(
        self,
        lent: Buffers,
        index: LayoutIndex,
        experts: Int64,
        homes_hRK: Sequence[torch.Tensor],
        out_CRK: torch.Tensor,
    ) -> Generator[Group | None, None, torch.Tensor]:
        """Send each rank its rows of this rank's replicated experts; return [X, r, K] of all."""
        dtype = out_CRK.dtype
        hop = self._hop(experts, index, out_CRK)
        buffers = self._buffers(lent, index, out_CRK, dtype.itemsize)
        sent = buffers.take("homes", (sum(hop.of_ranks),), dtype)
        blocks = row_blocks(out_CRK.shape[1], self._num_ranks, self._num_ranks)
        for at, home in enumerate(hop.mine):
            pack_rows(homes_hRK[home][None], sent, blocks, at, len(hop.mine))
        shape = (len(experts), *self._of_rows.own_rows_of(out_CRK))
        slice_XrK = buffers.take("rows", shape, dtype)
        moved = yield from self._restore_stage.all_to_all(
            slice_XrK.view(-1), sent, hop.of_homes, hop.of_ranks, more=True
        )
        self.count.add_restore(*moved)
        return slice_XrK

    def _hop(self, experts: Int64, index: LayoutIndex, like_CRK: torch.Tensor) -> _Hop:
        num_homes = index.placed.geometry.home_slots
        home_N = np.bincount(experts // num_homes, minlength=self._num_ranks).tolist()
        own_rows, columns = self._of_rows.own_rows_of(like_CRK)
        blocks = row_blocks(like_CRK.shape[1], self._num_ranks, self._num_ranks)
        first = self._rank * num_homes
        mine = experts[(experts >= first) & (experts < first + num_homes)] - first
        return _Hop(
            mine.tolist(),
            of_homes=[number * own_rows * columns for number in home_N],
            of_ranks=[len(mine) * rows * columns for rows in blocks.rows_G],
        )

    def _buffers(
        self, lent: Buffers, index: LayoutIndex, like_CRK: torch.Tensor, element_bytes: int
    ) -> MatrixBuffers:
        """Return buffers for the most experts that can have replicas, with their own names."""
        _, rows, columns = like_CRK.shape
        sizes = relay_workspace(self._of_rows.geometry_of(index), rows, columns, element_bytes)
        return MatrixBuffers(lent, sizes, like_CRK.device)


class _Hop(NamedTuple):
    """Elements of the hop between homes and row blocks: by home rank, and by rank of a block."""

    mine: list[int]
    of_homes: list[int]
    of_ranks: list[int]
