"""The routine behind all exchanges: one leg across spans of ranks, one inside a span.

A span is a node (`node_exchange`) or the whole group (`restore.FlatExchange`), whose only leg is
the inner one.

Legend: N ranks, E experts, C slots per rank; G ranks per span, M = N/G spans, D distinct experts of
a span, n slots of a span to restore; R rows of a matrix, r rows of the slice that one rank holds,
P rows of a place (rank g of every span), K columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_laer.planner.geometry import Geometry
from megatron_laer.runtime.comm.exchange import ExchangeCount, Kept
from megatron_laer.runtime.comm.layout_index import (
    LayoutIndex,
    ReduceIndex,
    RestoreIndex,
    Rounds,
    reduce_index,
    restore_index,
)
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.row_blocks import RowBlocks, row_blocks
from megatron_laer.runtime.comm.workspace import Workspace, reduce_workspace, restore_workspace

# `Workspace.take` with the sizes of one matrix: a tensor on a named buffer, by shape and dtype.
_Take = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Leg:
    """A communicator, and which of its ranks are here or near.

    Attributes:
        position: of this rank in the group.
        near: the range of ranks in the group that are on this rank's node.
    """

    group: dist.ProcessGroup
    position: int
    near: slice

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, sizes: list[int], sent_sizes: list[int]
    ) -> tuple[int, int]:
        """Exchange flat tensors; returns bytes received inside the node and between nodes."""
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group)
        near = sum(sizes[self.near])
        element = received.element_size()
        return (near - sizes[self.position]) * element, (sum(sizes) - near) * element


class HierarchicalExchange:
    """Restore and reduce through spans of G ranks.

    A restore fetches, from the rank at the same place of every span, the rows that those ranks hold
    of each distinct expert of this span (leg `across`); then the ranks of a span give each other
    those rows for their slots (leg `inside`). A reduce goes the other way, and sums before and
    after the leg across. With one span, or with one rank per span, one leg is left out.

    Args:
        span: G, ranks per span; it divides N.
        restore_legs, reduce_legs: `(across, inside)`, None for a leg that is left out.
        grad_wire_dtype: of gradients between spans, whatever a reduce says.
    """

    def __init__(
        self,
        groups: FSEPGroups,
        span: int,
        restore_legs: tuple[Leg | None, Leg | None],
        reduce_legs: tuple[Leg | None, Leg | None],
        grad_wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.groups = groups
        self.count = ExchangeCount()
        self.restore_workspace, self.reduce_workspace = Workspace(), Workspace()
        self._span = span
        self._mine, self._place = divmod(groups.rank, span)
        self._restore_legs, self._reduce_legs = restore_legs, reduce_legs
        self._grad_wire_dtype = grad_wire_dtype

    def prepare(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        """See `Exchange`."""
        self._restore_index(index, before)
        self._reduce_index(index)

    @torch.no_grad()
    def restore(
        self,
        slice_ErK: torch.Tensor,
        index: LayoutIndex,
        rows: int,
        *,
        kept: Kept | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Exchange`."""
        assert kept is None or out is None, "what is kept is updated in place"
        columns = slice_ErK.shape[2]
        shape = (index.layout.capacity, rows, columns)
        out_CRK = out if kept is None else kept.matrix_CRK
        out_CRK = slice_ErK.new_empty(shape) if out_CRK is None else out_CRK
        assert out_CRK.shape == shape and out_CRK.is_contiguous()
        plan = self._restore_index(index, None if kept is None else kept.index)
        if not plan.anything:
            return out_CRK

        blocks = row_blocks(rows, self.groups.size, self._span)
        most = restore_workspace(self._geometry(index), rows, columns, slice_ErK.element_size())
        take = partial(self.restore_workspace.take, device=slice_ErK.device, most=most)
        across, inside = self._restore_legs
        # Without a leg across, the span's experts are all experts, and a place's rows a rank's.
        source = slice_ErK
        if across is not None:
            source = self._fetch(across, slice_ErK, plan, blocks, take, out_CRK)
        if inside is not None:
            self._spread(inside, source, plan, blocks, take, out_CRK)
        else:
            for first, slots in plan.runs:
                self._pick(source, plan, blocks, first, out_CRK[slots])
        return out_CRK

    @torch.no_grad()
    def reduce(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Exchange`."""
        grad_CRK = grad_CRK.contiguous()
        _, rows, columns = grad_CRK.shape
        blocks = row_blocks(rows, self.groups.size, self._span)
        shape = (index.layout.num_experts, blocks.rows_GM[self._place][self._mine], columns)
        out_ErK = grad_CRK.new_empty(shape) if out is None else out
        assert out_ErK.shape == shape and out_ErK.is_contiguous()
        plan = self._reduce_index(index)
        wire = self._grad_wire_dtype or wire_dtype or grad_CRK.dtype
        most = reduce_workspace(
            self._geometry(index), rows, columns, grad_CRK.element_size(), wire.itemsize
        )
        take = partial(self.reduce_workspace.take, device=grad_CRK.device, most=most)
        across, inside = self._reduce_legs
        parts, rounds = grad_CRK, plan.in_span
        if inside is not None:
            parts = self._collect(inside, grad_CRK, blocks, take)
        if across is not None:
            parts = self._sum_and_send(across, parts, plan, blocks, take, wire)
            rounds = plan.over_spans
        _sum(parts, rounds, out_ErK, take)
        return out_ErK

    def _fetch(
        self,
        leg: Leg,
        slice_ErK: torch.Tensor,
        plan: RestoreIndex,
        blocks: RowBlocks,
        take: _Take,
        kept_CRK: torch.Tensor,
    ) -> torch.Tensor:
        """Leg across: this place's rows of the experts that the span needs.

        Returns:
            Flat: experts fetched from other spans, [D, r, K] span by span, then those that ranks of
            this span gave each other, [D, P, K] with the P rows of this place.
        """
        _, mine, columns = slice_ErK.shape
        fetched, given = plan.fetched_M[self._mine], sum(plan.given_G)
        rows_M = blocks.rows_GM[self._place]
        expert_size = sum(rows_M) * columns
        received = take("receive", ((fetched + given) * expert_size,), slice_ErK.dtype)
        from_far, from_near = received.split([fetched * expert_size, given * expert_size])
        if sum(plan.fetched_M):  # known to every rank
            send = take("send", (sum(plan.fetched_M), mine, columns), slice_ErK.dtype)
            torch.index_select(slice_ErK, 0, plan.sent_experts, out=send)
            sizes = [fetched * rows * columns for rows in rows_M]
            sent_sizes = [count * mine * columns for count in plan.fetched_M]
            intra, inter = leg.all_to_all(from_far, send.view(-1), sizes, sent_sizes)
            self._count_restore(intra, inter)
        if given:
            self._give(kept_CRK, plan, blocks, take, from_near)
        return received

    def _give(
        self,
        kept_CRK: torch.Tensor,
        plan: RestoreIndex,
        blocks: RowBlocks,
        take: _Take,
        received: torch.Tensor,
    ) -> None:
        """This place's rows of experts that ranks of the span have whole, from before."""
        _, inside = self._restore_legs
        count, (_, rows, columns) = len(plan.given_slots), kept_CRK.shape
        send = received
        if inside is not None:
            send = take("send", (count * rows * columns,), kept_CRK.dtype)
        for position, slot in enumerate(plan.given_slots):
            for whole, part in blocks.pairs(kept_CRK[slot : slot + 1], send, position, count):
                part.copy_(whole)
        if inside is None:
            return
        place_rows = blocks.place_rows_G
        sizes = [given * place_rows[self._place] * columns for given in plan.given_G]
        sent_sizes = [count * rows * columns for rows in place_rows]
        intra, inter = inside.all_to_all(received, send, sizes, sent_sizes)
        self._count_restore(intra, inter)

    def _spread(
        self,
        leg: Leg,
        source: torch.Tensor,
        plan: RestoreIndex,
        blocks: RowBlocks,
        take: _Take,
        out_CRK: torch.Tensor,
    ) -> None:
        """Leg inside: this place's rows to the slots of the span, whole experts to mine."""
        total = sum(plan.restored_G)
        if total == 0:  # known to every rank of the span
            return
        columns = out_CRK.shape[2]
        place_rows = blocks.place_rows_G
        mine, restored = place_rows[self._place], plan.restored_G[self._place]
        send = take("send", (total, mine, columns), out_CRK.dtype)
        self._pick(source, plan, blocks, 0, send)
        sizes = [restored * rows * columns for rows in place_rows]
        received = take("receive", (sum(sizes),), out_CRK.dtype)
        sent_sizes = [count * mine * columns for count in plan.restored_G]
        intra, inter = leg.all_to_all(received, send.view(-1), sizes, sent_sizes)
        self._count_restore(intra, inter)
        for first, slots in plan.runs:
            for whole, part in blocks.pairs(out_CRK[slots], received, first, restored):
                whole.copy_(part)

    def _pick(
        self,
        source: torch.Tensor,
        plan: RestoreIndex,
        blocks: RowBlocks,
        first: int,
        target_nPK: torch.Tensor,
    ) -> None:
        """This place's rows of the experts of some of the span's slots to restore.

        Args:
            source: what `_fetch` returned; with one span, the slices of all experts.
            first: which of the slots to restore is the first of the target's.
        """
        count, rows, columns = target_nPK.shape
        spans = blocks.num_spans
        if spans == 1:
            torch.index_select(source, 0, plan.picked[first : first + count], out=target_nPK)
            return
        fetched, given = plan.fetched_M[self._mine], sum(plan.given_G)
        if blocks.even:
            block = rows // spans * columns
            torch.index_select(
                source.view((fetched + given) * spans, block),
                0,
                plan.picked_M[first * spans : (first + count) * spans],
                out=target_nPK.view(count * spans, block),
            )
            return
        picked = plan.picked[first : first + count]
        from_far, from_near = source.split([part * rows * columns for part in (fetched, given)])
        offset = 0
        for size in blocks.rows_GM[self._place]:
            here = slice(offset, offset + size)
            far = from_far[fetched * offset * columns : fetched * (offset + size) * columns]
            near = from_near.view(given, rows, columns)[:, here]
            target_nPK[:, here] = torch.cat((far.view(fetched, size, columns), near))[picked]
            offset += size

    def _collect(
        self, leg: Leg, grad_CRK: torch.Tensor, blocks: RowBlocks, take: _Take
    ) -> torch.Tensor:
        """Leg inside: this place's rows of the gradients of all slots of the span."""
        capacity, _, columns = grad_CRK.shape
        place_rows = blocks.place_rows_G
        mine = place_rows[self._place]
        send = take("send", (grad_CRK.numel(),), grad_CRK.dtype)
        for whole, part in blocks.pairs(grad_CRK, send, 0, capacity):
            part.copy_(whole)
        received = take("receive", (self._span * capacity, mine, columns), grad_CRK.dtype)
        sizes = [capacity * mine * columns] * self._span
        sent_sizes = [capacity * rows * columns for rows in place_rows]
        intra, inter = leg.all_to_all(received.view(-1), send, sizes, sent_sizes)
        self._count_reduce(intra, inter)
        return received

    def _sum_and_send(
        self,
        leg: Leg,
        parts_nPK: torch.Tensor,
        plan: ReduceIndex,
        blocks: RowBlocks,
        take: _Take,
        wire: torch.dtype,
    ) -> torch.Tensor:
        """Leg across: this rank's rows of every span's sums, D of them span by span."""
        _, rows, columns = parts_nPK.shape
        distinct = plan.distinct_M[self._mine]
        sizes_M = blocks.rows_GM[self._place]
        send = take("send", (distinct * rows * columns,), wire)
        sent_sizes = [distinct * size * columns for size in sizes_M]
        offset = 0
        for size, part in zip(sizes_M, send.split(sent_sizes), strict=True):
            rows_of_span = parts_nPK[:, offset : offset + size]
            _sum(rows_of_span, plan.in_span, part.view(distinct, size, columns), take)
            offset += size
        mine = sizes_M[self._mine]
        received = take("receive", (sum(plan.distinct_M), mine, columns), wire)
        sizes = [count * mine * columns for count in plan.distinct_M]
        intra, inter = leg.all_to_all(received.view(-1), send, sizes, sent_sizes)
        self._count_reduce(intra, inter)
        return received

    def _restore_index(self, index: LayoutIndex, before: LayoutIndex | None) -> RestoreIndex:
        return restore_index(
            None if before is None else before.layout,
            index.layout,
            self._span,
            self.groups.rank,
            index.device,
        )

    def _reduce_index(self, index: LayoutIndex) -> ReduceIndex:
        return reduce_index(index.layout, self._span, self.groups.rank, index.device)

    def _geometry(self, index: LayoutIndex) -> Geometry:
        layout = index.layout
        return Geometry(layout.num_ranks, layout.num_experts, layout.capacity, self._span)

    def _count_restore(self, intra_bytes: int, inter_bytes: int) -> None:
        self.count.restore_intra_bytes += intra_bytes
        self.count.restore_inter_bytes += inter_bytes
        self.count.restore_collectives += 1

    def _count_reduce(self, intra_bytes: int, inter_bytes: int) -> None:
        self.count.reduce_intra_bytes += intra_bytes
        self.count.reduce_inter_bytes += inter_bytes
        self.count.reduce_collectives += 1


def _sum(parts: torch.Tensor, rounds: Rounds, target_DrK: torch.Tensor, take: _Take) -> None:
    """Sum parts [n, r, K] into their targets in float32, round by round."""
    (_, first), *others = rounds
    if not others and parts.dtype == target_DrK.dtype:
        torch.index_select(parts, 0, first, out=target_DrK)
        return

    def widened(sources: torch.Tensor) -> torch.Tensor:
        shape = (len(sources), *parts.shape[1:])
        picked = take("picked", shape, parts.dtype)
        torch.index_select(parts, 0, sources, out=picked)
        if parts.dtype == torch.float32:
            return picked
        return take("widened", shape, torch.float32).copy_(picked)

    in_place = target_DrK.dtype == torch.float32
    total = target_DrK if in_place else take("total", tuple(target_DrK.shape), torch.float32)
    if parts.dtype == torch.float32:
        torch.index_select(parts, 0, first, out=total)
    else:
        total.copy_(widened(first))
    for targets, sources in others:
        total.index_add_(0, targets, widened(sources))
    if not in_place:
        target_DrK.copy_(total)
