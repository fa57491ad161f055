"""The exchange: restores of experts into slots, and reduces of their gradients to the owners.

`planner.hops` has the chains by which experts move, and `moves.py` a rank's rows of each hop. This
file carries them out: pack, All-to-All, unpack or sum.

Legend: N ranks, E experts, C replica slots per rank, h home experts of a rank. R rows of a matrix,
r rows of one rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laer.config import FSEPConfig, WireDtype
from megatron_laer.planner.hops import Link, Way
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm.buffers import MatrixBuffers, Workspace
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.moves import Chain, Move
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.segments import Held
from megatron_laer.runtime.comm.stages import ExchangeCount, Stage, stage_of
from megatron_laer.runtime.comm.steps import Steps, finish

_WIRE_DTYPES = {
    WireDtype.BF16: torch.bfloat16,
    WireDtype.FP16: torch.float16,
    WireDtype.FP32: torch.float32,
}


@dataclass(frozen=True)
class ReusableWeights:
    """Restored matrix and its layout, to update in place until the optimizer changes the owners."""

    index: LayoutIndex
    matrix_CRK: torch.Tensor


class Exchange:
    """Restores and reduces of matrices, collective over the group: all ranks call in one order.

    Each layout goes by the way of all ranks' choice. All ways restore the same bits. Of n replicas,
    a way with several hops rounds sums to the wire's dtype between two hops:

        |one hop - two hops| <= (u_wire + 2·u_grad + 2·n·2**-24)·Σ|replica|

    Here u = 2**-8 for bfloat16, 2**-11 for float16, and 0 for float32, whose roundings are in the
    last term. Float16 adds n·2**-24 for underflow, and each further hop u_wire.

    Exchanges of a layer's matrices may run side by side, step by step (`steps.py`). Restores share
    communicators and a workspace, reduces others. So one restore and one reduce may be in flight at
    once, from two threads or two streams, but no two restores.

    Args:
        ways: all that `choose` may return.
        choose: the way of a layout, the same on every rank; the only one by default.
        grad_wire_dtype: of sums between hops; overrides a reduce's.
    """

    def __init__(
        self,
        groups: FSEPGroups,
        ways: Sequence[Way],
        choose: Callable[[Placed], Way] | None = None,
        grad_wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.count = ExchangeCount()
        self.restore_workspace, self.reduce_workspace = Workspace(), Workspace()
        links = dict.fromkeys(link for way in ways for link in way.links)
        self._restore_stages = {link: stage_of(groups, "parameters", link) for link in links}
        self._reduce_stages = {link: stage_of(groups, "gradients", link) for link in links}
        self.groups = groups
        self._choose = choose or (lambda _: ways[0])
        self._grad_wire_dtype = grad_wire_dtype

    @property
    def communicators(self) -> tuple[Group, ...]:
        """Return the communicators that exchanges of layouts can use, as on all ranks."""
        used = (*self._restore_stages.values(), *self._reduce_stages.values())
        return tuple(stage.group for stage in used if stage is not None)

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        """Choose the way of a layout and find this rank's part of it, unless that is known."""
        self._chain(index, before)

    def prepare_reduce(self, index: LayoutIndex) -> None:
        self._chain(index)

    @torch.no_grad()
    def restore(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `restore_steps` to their end."""
        return finish(self.restore_steps(*args, **kwargs))

    @torch.no_grad()
    def reduce(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `reduce_steps` to their end."""
        return finish(self.reduce_steps(*args, **kwargs))

    def restore_steps(
        self,
        source: torch.Tensor | Sequence[torch.Tensor],
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        """Restore whole experts for this rank's slots.

        Args:
            source: this rank's rows of every expert, [E, r, K], or [R, K] of each home expert. Only
                home experts that are sent are read.
            rows: R.
            reuse: weights of another layout, the same one on all ranks. Only slots with another
                expert are restored, in place; only experts new to a node cross nodes. If no slot of
                any rank differs, there is no collective.
            out: contiguous [C, R, K] to restore to, instead of a new tensor; not with `reuse`.

        Returns:
            [C, R, K], the expert of this rank's slot c at c; `out` or the reused tensor if given.
        """
        assert reuse is None or out is None, "reused weights are updated in place"
        chain = self._chain(index, None if reuse is None else reuse.index)
        moves = chain.restores(rows)
        out_CRK = out if reuse is None else reuse.matrix_CRK
        if out_CRK is None:
            of_one = source if isinstance(source, torch.Tensor) else source[0]
            shape = index.placed.geometry.replica_slots, rows, of_one.shape[-1]
            out_CRK = of_one.new_empty(shape)
        assert out_CRK.shape[1] == rows and out_CRK.is_contiguous()
        columns, dtype = out_CRK.shape[2], out_CRK.dtype
        slots: Held = [out_CRK.view(-1, columns)]
        held, end = _by_rows(source), 0
        sizes = restore_workspace(chain.way, rows, columns, dtype.itemsize)
        with self.restore_workspace.lent() as lent:
            buffers = MatrixBuffers(lent, columns, sizes, out_CRK.device, grow=chain.way.is_direct)
            for at, move in enumerate(moves):
                target, arrives = slots, move.arrives
                if not move.is_last:
                    end = max(end, arrives.end)
                    target = [buffers.take("receive", end, dtype)]
                taken = slots if move.is_kept else held
                stage = self._restore_stages[move.link]
                if stage is None:
                    arrives.unpack(taken[0], target)
                else:
                    # Else they lie in the buffer that the next rows go to.
                    may_stay = move.is_first or move.is_kept
                    sent = _packed(move, taken, buffers, dtype, may_stay=may_stay)
                    if arrives.in_place is None:
                        arrived = buffers.take("receive", sum(move.received_P), dtype)
                    else:
                        arrived = arrives.view(target)
                    more = _has_more(moves[at + 1 :], self._restore_stages)
                    sending = stage.all_to_all(
                        arrived, sent, move.received_P, move.sent_P, more=more
                    )
                    self.count.add_restore(*(yield from sending))
                    if arrives.in_place is None:
                        arrives.unpack(arrived, target)
                held = target
        return out_CRK

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> Steps:
        """Sum gradients over replicas, for this rank's share of the experts.

        Sums run in float32 and in slot order, or in node order: the same gradients give the same
        bits. They are rounded once per hop, in the end to the dtype of the result.

        Args:
            grad_CRK: gradients of this rank's slots, not modified.
            wire_dtype: of sums between hops, unless set for the exchange; default: the gradient's.
            add_to: main gradient to add the sums to, contiguous [E, r, K], or [R, K] of each home
                expert, of any float dtype.

        Returns:
            `add_to`, or its first tensor. Without it, the sums in the gradient's dtype: [E, r, K],
            or [h, R, K] with zeros for home experts without replicas.
        """
        grad_CRK = grad_CRK.contiguous()
        chain = self._chain(index)
        _, rows, columns = grad_CRK.shape
        moves = chain.reduces(rows)
        wire = self._grad_wire_dtype or wire_dtype or grad_CRK.dtype
        result: torch.Tensor | None = None
        if add_to is None:
            result = grad_CRK.new_zeros(self._own_shape(chain.way, rows, columns))
            add_to = result.unbind() if chain.way.at_home else result
        owners = _by_rows(add_to)
        sizes = reduce_workspace(chain.way, rows, columns, grad_CRK.itemsize, wire.itemsize)
        held: Held = [grad_CRK.view(-1, columns)]
        with self.reduce_workspace.lent() as lent:
            buffers = MatrixBuffers(lent, columns, sizes, grad_CRK.device, grow=chain.way.is_direct)
            for at, move in enumerate(moves):
                stage, arrived = self._reduce_stages[move.link], held[0]
                if stage is not None:
                    dtype = grad_CRK.dtype if move.is_first else wire
                    sent = _packed(move, held, buffers, dtype)
                    arrived = buffers.take("receive", sum(move.received_P), dtype)
                    more = _has_more(moves[at + 1 :], self._reduce_stages)
                    sending = stage.all_to_all(
                        arrived, sent, move.received_P, move.sent_P, more=more
                    )
                    self.count.add_reduce(*(yield from sending))
                target = owners
                if not move.is_last:
                    target = [buffers.take("send", move.arrives.end, wire)]
                move.arrives.add(arrived, target, adds=result is None and move.is_last)
                held = target
        if result is None:
            return add_to if isinstance(add_to, torch.Tensor) else add_to[0]
        return result

    def _chain(self, index: LayoutIndex, before: LayoutIndex | None = None) -> Chain:
        way = self._choose(index.placed)
        return index.chain(way, None if before is None else before.placed, self.groups.rank)

    def _own_shape(self, way: Way, rows: int, columns: int) -> tuple[int, int, int]:
        geometry = way.geometry
        if way.at_home:
            return geometry.home_slots, rows, columns
        bounds = row_bounds(rows, geometry.num_ranks)
        return (
            geometry.num_experts,
            bounds[self.groups.rank + 1] - bounds[self.groups.rank],
            columns,
        )


def _packed(
    move: Move,
    held: Held,
    buffers: MatrixBuffers,
    dtype: torch.dtype,
    *,
    may_stay: bool = True,
) -> torch.Tensor:
    """Return the rows to send; those that lie as on the wire may stay where they are."""
    if may_stay and move.leaves.in_place is not None:
        return move.leaves.view(held)
    sent = buffers.take("send", sum(move.sent_P), dtype)
    move.leaves.pack(held, sent)
    return sent


def _has_more(moves: Sequence[Move], stages: Mapping[Link, Stage | None]) -> bool:
    """Return whether an All-to-All is among the moves."""
    return any(stages[move.link] is not None for move in moves)


def _by_rows(owned: torch.Tensor | Sequence[torch.Tensor]) -> Held:
    """Return matrices as tensors of rows; one tensor of them must be contiguous."""
    return [owned.view(-1, owned.shape[2])] if isinstance(owned, torch.Tensor) else owned


def wire_dtype(config: FSEPConfig) -> torch.dtype | None:
    """Return the dtype of gradients between hops; None for a reduce's own."""
    return None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]
