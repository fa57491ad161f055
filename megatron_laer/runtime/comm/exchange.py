"""The exchange: restores of experts into slots, and reduces of their gradients to the owners.

`planner.hops` has the chains by which experts move, and `segments.py` a rank's rows of each hop.
This file carries them out: pack, All-to-All, unpack or sum.

Legend: N ranks, E experts, C replica slots per rank, h home experts of a rank. R rows of a matrix,
r rows of one rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch

from megatron_laer.choices import WireDtype
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.hops import Way
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.segments import Chain, Held
from megatron_laer.runtime.comm.stages import Direction, ExchangeCount, Stage, stage_of
from megatron_laer.runtime.comm.steps import Steps

_WIRE_DTYPES = {
    WireDtype.BF16: torch.bfloat16,
    WireDtype.FP16: torch.float16,
    WireDtype.FP32: torch.float32,
}


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
        self.groups = groups
        self._choose = choose or (lambda _: ways[0])
        self._grad_wire_dtype = grad_wire_dtype
        links = dict.fromkeys(link for way in ways for link in way.links)

        def stages(name: str) -> dict[int, Stage | None]:
            return {link: stage_of(groups, name, link) for link in links}

        self.restored = Direction(stages("parameters"), sums=False)
        self.reduced = Direction(stages("gradients"), sums=True)

    @property
    def communicators(self) -> tuple[Group, ...]:
        """Return the communicators that exchanges of layouts can use, as on all ranks."""
        used = (*self.restored.stages.values(), *self.reduced.stages.values())
        return tuple(stage.group for stage in used if stage is not None)

    @property
    def received_bytes(self) -> int:
        return self.restored.received_bytes + self.reduced.received_bytes

    def restore_steps(
        self,
        source: torch.Tensor | Sequence[torch.Tensor],
        index: LayoutIndex,
        rows: int,
        /,
        *,
        before: LayoutIndex | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        """Restore whole experts for this rank's slots.

        Args:
            source: this rank's rows of every expert, [E, r, K], or [R, K] of each home expert. Only
                home experts that are sent are read.
            rows: R.
            before: the layout whose experts `out` has, the same one on all ranks, until the
                optimizer changes the owners. Only slots with another expert are restored; only
                experts new to a node cross nodes. If no slot of any rank differs, there is no
                collective.
            out: contiguous [C, R, K] to restore to, instead of a new tensor.

        Returns:
            `out`, or [C, R, K], with the expert of this rank's slot c at c.
        """
        chain = self._chain(index, rows, before)
        if out is None:
            assert before is None, "weights of another layout are updated in place"
            of_one = source if isinstance(source, torch.Tensor) else source[0]
            out = of_one.new_empty(index.placed.geometry.replica_slots, rows, of_one.shape[-1])
        assert out.shape[1] == rows and out.is_contiguous()
        slots, dtype = out.view(-1, out.shape[2]), out.dtype
        most_bytes = restore_workspace(chain.way, rows, slots.shape[1], dtype.itemsize)
        ends = _by_rows(source), [slots]
        yield from _carry(self.restored, chain, *ends, most_bytes, (dtype, dtype))
        return out

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
                expert, of any float dtype; zeros of the gradient's dtype by default.

        Returns:
            `add_to`, or its first tensor.
        """
        grad_CRK = grad_CRK.contiguous()
        _, rows, columns = grad_CRK.shape
        chain = self._chain(index, rows, back=True)
        dtype, wire = grad_CRK.dtype, self._grad_wire_dtype or wire_dtype or grad_CRK.dtype
        if add_to is None:
            add_to = grad_CRK.new_zeros((*self._own_shape(index.placed, rows), columns))
        owned = [*add_to] if chain.way.at_home else _by_rows(add_to)
        most_bytes = reduce_workspace(chain.way, rows, columns, dtype.itemsize, wire.itemsize)
        ends = [grad_CRK.view(-1, columns)], owned
        yield from _carry(self.reduced, chain, *ends, most_bytes, (dtype, wire))
        return add_to if isinstance(add_to, torch.Tensor) else add_to[0]

    def _chain(
        self,
        index: LayoutIndex,
        rows: int,
        before: LayoutIndex | None = None,
        *,
        back: bool = False,
    ) -> Chain:
        """Return this rank's part, by the way that is chosen for the layout."""
        key = self, rows, back, None if before is None else before.placed.layout
        if key not in index.chains:
            placed, kept = index.placed, None if before is None else before.placed
            parts = self._choose(placed), placed, kept, self.groups.rank, rows, index.device
            index.chains[key] = Chain(*parts, back=back)
        return index.chains[key]

    def _own_shape(self, placed: Placed, rows: int) -> tuple[int, int]:
        geometry, rank = placed.geometry, self.groups.rank
        if geometry.home_slots:
            return geometry.home_slots, rows
        bounds = row_bounds(rows, geometry.num_ranks)
        return geometry.num_experts, bounds[rank + 1] - bounds[rank]


def _carry(
    direction: Direction,
    chain: Chain,
    source: Held,
    target: Held,
    most_bytes: Mapping[str, int],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Generator[Group | None, None, None]:
    """Carry a chain's moves out, each by packing, an All-to-All, and unpacking or summing.

    Rows that lie as on the wire stay where they are, and those that are to lie so arrive there.

    Args:
        most_bytes: of buffers; where whole experts go directly, they grow to what is needed.
        dtypes: of the rows of the source and of all others on the wire.
    """
    table, sums, held = chain.table, direction.sums, source
    stages = [direction.stages[move.link] for move in chain.moves]
    slots = (source if sums else target)[0]
    bounds = None if chain.way.is_direct else most_bytes
    with direction.workspace.lent(bounds, slots.shape[1], slots.device) as take:
        for at, (move, stage) in enumerate(zip(chain.moves, stages, strict=True)):
            leaves, arrives, dtype = move.leaves, move.arrives, dtypes[not move.is_first]
            taken, into = target if move.is_kept else held, target
            if not move.is_last:
                into = [take("send" if sums else "receive", arrives.end, dtypes[1])]
            in_place = stage is not None and not sums and arrives.in_place is not None
            if stage is None:
                arrived = taken[0]
            else:
                # Else they lie in the buffer that the next rows go to.
                may_stay = sums or move.is_first or move.is_kept
                if may_stay and leaves.in_place is not None:
                    sent = leaves.view(taken)
                else:
                    sent = take("send", leaves.rows, dtype)
                    table.pack(leaves, taken, sent)
                arrived = arrives.view(into) if in_place else take("receive", arrives.rows, dtype)
                yield stage.group
                stage.all_to_all(arrived, sent, move.received_P, move.sent_P)
                yield stage.group if any(stages[at + 1 :]) else None
                direction.count(stage, move.received_P, slots.shape[1] * dtype.itemsize)
            if sums:
                table.add(arrives, arrived, into, adds=move.is_last)
            elif not in_place:
                table.unpack(arrives, arrived, into)
            held = into


def _by_rows(owned: torch.Tensor | Sequence[torch.Tensor]) -> Held:
    """Return matrices as tensors of rows; one tensor of them must be contiguous."""
    return [owned.view(-1, owned.shape[2])] if isinstance(owned, torch.Tensor) else owned


def wire_dtype(config: FSEPConfig) -> torch.dtype | None:
    """Return the dtype of gradients between hops; None for a reduce's own."""
    return None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]
