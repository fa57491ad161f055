"""The exchange: restores of experts into slots, and reduces of their gradients to the owners.

`planner.hops` has the chains by which experts move, and `segments.py` a rank's rows of each hop.
This file carries them out: pack, All-to-All, unpack or sum.

Legend: C replica slots per rank. R rows of an expert, in which all its matrices are carried, K
columns of each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch

from megatron_laer.choices import WireDtype
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.hops import Way
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.segments import Chain, Held, Matrices
from megatron_laer.runtime.comm.stages import Direction, ExchangeCount, Stage, stage_of
from megatron_laer.runtime.comm.streams import Steps

_WIRE_DTYPES = {
    WireDtype.BF16: torch.bfloat16,
    WireDtype.FP16: torch.float16,
    WireDtype.FP32: torch.float32,
}


class Exchange:
    """Restores and reduces of experts, collective over the group: all ranks call in one order.

    Each layout goes by the way of all ranks' choice. All ways restore the same bits. Of n replicas,
    a way with several hops rounds sums to the wire's dtype between two hops:

        |one hop - two hops| <= (u_wire + 2·u_grad + 2·n·2**-24)·Σ|replica|

    Here u = 2**-8 for bfloat16, 2**-11 for float16, and 0 for float32, whose roundings are in the
    last term. Float16 adds n·2**-24 for underflow, and each further hop u_wire.

    All matrices of a layer's experts go in one exchange. Restores share communicators and a
    workspace, reduces others. So one restore and one reduce may be in flight at once, from two
    threads or two streams, but no two restores.

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
        self.choose = choose or (lambda _: ways[0])
        self._grad_wire_dtype = grad_wire_dtype
        links = dict.fromkeys(link for way in ways for link in way.links)

        def stages(name: str) -> dict[int, Stage | None]:
            return {link: stage_of(groups, name, link) for link in links}

        self.restored = Direction(stages("parameters"))
        self.reduced = Direction(stages("gradients"))

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
        owned: Held,
        index: LayoutIndex,
        matrices: Matrices,
        /,
        *,
        out: torch.Tensor,
        before: LayoutIndex | None = None,
    ) -> Steps:
        """Restore whole experts for this rank's slots.

        Args:
            owned: this rank's rows: a tensor for each matrix with those of every expert, or for
                each matrix and home expert. Only home experts that are sent are read.
            matrices: of an expert, as in `Chain`.
            out: contiguous [C, rows of an expert, K]; slot c gets its expert's matrices at c.
            before: the layout whose experts `out` has, the same one on all ranks, until the
                optimizer changes the owners. Only slots with another expert are restored; only
                experts new to a node cross nodes. If no slot of any rank differs, there is no
                collective.

        Returns:
            `out`.
        """
        assert out.is_contiguous()
        chain = self._chain(index, matrices, before)
        slots, dtype = out.view(-1, out.shape[2]), out.dtype
        row_bytes = slots.shape[1] * dtype.itemsize
        if chain.way.buffers_grow:
            bounds = chain.restore_bytes(row_bytes)
        else:
            bounds = restore_workspace(chain.way, matrices, row_bytes)
        parts = [owned[at] for at in chain.owned]
        yield from _restore(self.restored, chain, parts, slots, bounds)
        return out

    def reduce_steps(
        self,
        grads_CRK: torch.Tensor,
        index: LayoutIndex,
        matrices: Matrices,
        /,
        *,
        add_to: Held,
        wire_dtype: torch.dtype | None = None,
    ) -> Steps:
        """Add sums of gradients over replicas to this rank's share of the experts.

        Sums run in float32 and in slot order, or in node order: the same gradients give the same
        bits. They are rounded once per hop, in the end to the dtype that they are added to.

        Args:
            grads_CRK: gradients of this rank's slots, as `restore_steps` restores experts.
            add_to: main gradients of any float dtype, as owned weights are given there.
            wire_dtype: of sums between hops, unless set for the exchange; default: the gradient's.

        Returns:
            The first tensor of `add_to`.
        """
        chain = self._chain(index, matrices, back=True)
        slots, dtype = grads_CRK.view(-1, grads_CRK.shape[2]), grads_CRK.dtype
        wire = self.wire_dtype(wire_dtype or dtype)
        row_bytes = [slots.shape[1] * of.itemsize for of in (dtype, wire)]
        if chain.way.buffers_grow:
            bounds = chain.reduce_bytes(*row_bytes)
        else:
            bounds = reduce_workspace(chain.way, matrices, *row_bytes)
        parts = [add_to[at] for at in chain.owned]
        yield from _reduce(self.reduced, chain, slots, parts, bounds, wire)
        return add_to[0]

    def wire_dtype(self, default: torch.dtype) -> torch.dtype:
        """Return the dtype of a reduce's sums between hops."""
        return self._grad_wire_dtype or default

    def _chain(
        self,
        index: LayoutIndex,
        matrices: Matrices,
        before: LayoutIndex | None = None,
        *,
        back: bool = False,
    ) -> Chain:
        """Return this rank's part, by the way that is chosen for the layout."""
        key = self, matrices, back, None if before is None else before.placed.layout
        if key not in index.chains:
            placed, kept = index.placed, None if before is None else before.placed
            parts = self.choose(placed), placed, kept, self.groups.rank, matrices, index.device
            index.chains[key] = Chain(*parts, back=back)
        return index.chains[key]


# Note: two moves may fill one holding. In an update the hop to a holding brings experts that no
# slot of its places had, and the move behind it those that one had. So memory is taken for all rows
# of a holding (`Chain.held_rows`) with the first move into it, and is its own until they have left.


def _restore(
    direction: Direction,
    chain: Chain,
    owned: Held,
    slots: torch.Tensor,
    most_bytes: Mapping[str, int],
) -> Generator[bool, None, None]:
    """Carry rows from the owners through the holdings to the slots.

    Rows of owners and slots that lie as on the wire stay where they are, and rows that are to lie
    so arrive there. Holdings take turns in the buffer to receive: one is packed before the next.
    """
    table, columns, dtype = chain.table, slots.shape[1], slots.dtype
    table.place(owned)
    holdings: dict[int, Held] = {-1: owned}
    stages = [direction.stages[move.link] for move in chain.moves]
    with direction.workspace.lent(most_bytes, slots.device) as space:
        for at, (move, stage) in enumerate(zip(chain.moves, stages, strict=True)):
            source = [slots] if move.is_kept else holdings.get(move.holding - 1, ())
            if stage is not None:
                if move.packs:
                    sent = space.send.take(move.leaves.rows, columns, dtype)
                    table.pack(move.leaves, source, sent)
                else:
                    sent = move.leaves.view(source)
                if not move.is_kept:
                    space.receive.give_back()
            if move.is_last:
                holdings[move.holding] = [slots]
            elif move.holding not in holdings:
                rows = chain.held_rows[move.holding]
                holdings[move.holding] = [space.receive.take(rows, columns, dtype)]
            into = holdings[move.holding]
            if stage is None:
                table.pack(move.leaves, source, into[0])
                continue
            unpacks = move.arrives.in_place is None
            arrived = (
                space.receive.take(move.arrives.rows, columns, dtype)
                if unpacks
                else move.arrives.view(into)
            )
            stage.all_to_all(arrived, sent, move.received_P, move.sent_P)
            direction.count(stage, move.received_P, columns * dtype.itemsize)
            yield any(stages[at + 1 :])
            space.send.give_back()
            if unpacks:
                table.unpack(move.arrives, arrived, into)


def _reduce(
    direction: Direction,
    chain: Chain,
    slots: torch.Tensor,
    owned: Held,
    most_bytes: Mapping[str, int],
    wire: torch.dtype,
) -> Generator[bool, None, None]:
    """Carry rows from the slots back through the holdings, and add the last sums to the owners'.

    Holdings take turns in the buffer to send: one has left before the sums of the next.
    """
    table, columns = chain.table, slots.shape[1]
    table.place(owned)
    held: Held = [slots]
    stages = [direction.stages[move.link] for move in chain.moves]
    with direction.workspace.lent(most_bytes, slots.device) as space:
        for at, (move, stage) in enumerate(zip(chain.moves, stages, strict=True)):
            arrived = held[0]
            if stage is not None:
                dtype = slots.dtype if move.is_first else wire
                if move.leaves_in_place:
                    sent = move.leaves.view(held)
                else:
                    sent = space.send.take(move.leaves.rows, columns, dtype)
                    table.pack(move.leaves, held, sent)
                arrived = space.receive.take(move.arrives.rows, columns, dtype)
                stage.all_to_all(arrived, sent, move.received_P, move.sent_P)
                direction.count(stage, move.received_P, columns * dtype.itemsize)
                yield any(stages[at + 1 :])
                space.send.give_back()
            if move.is_last:
                held = owned
            else:
                held = [space.send.take(chain.held_rows[move.holding - 1], columns, wire)]
            table.add(move.arrives, arrived, held, adds=move.is_last)
            space.receive.give_back()


def wire_dtype(config: FSEPConfig) -> torch.dtype | None:
    """Return the dtype of gradients between hops; None for a reduce's own."""
    return None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]
