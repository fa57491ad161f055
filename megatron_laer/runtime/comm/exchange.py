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
        bounds = restore_workspace(chain.way, matrices, slots.shape[1] * dtype.itemsize)
        yield from _carry(self.restored, chain, owned, [slots], bounds, (dtype, dtype))
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
        wire = self._grad_wire_dtype or wire_dtype or dtype
        row_bytes = [slots.shape[1] * of.itemsize for of in (dtype, wire)]
        bounds = reduce_workspace(chain.way, matrices, *row_bytes)
        yield from _carry(self.reduced, chain, [slots], add_to, bounds, (dtype, wire))
        return add_to[0]

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
            parts = self._choose(placed), placed, kept, self.groups.rank, matrices, index.device
            index.chains[key] = Chain(*parts, back=back)
        return index.chains[key]


def _carry(
    direction: Direction,
    chain: Chain,
    source: Held,
    target: Held,
    most_bytes: Mapping[str, int],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Generator[bool, None, None]:
    """Carry a chain's moves out, each by packing, an All-to-All, and unpacking or summing.

    Rows that lie as on the wire stay where they are, and those that are to lie so arrive there.

    Args:
        most_bytes: of buffers, unless the way's grow to what is needed.
        dtypes: of the rows of the source and of all others on the wire.
    """
    table, sums = chain.table, direction.sums
    owned = [(target if sums else source)[at] for at in chain.owned]
    source, target = (source, owned) if sums else (owned, target)
    table.place(owned)
    held, slots = source, (source if sums else target)[0]
    stages = [direction.stages[move.link] for move in chain.moves]
    columns, device = slots.shape[1], slots.device

    def take(name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        most = None if chain.way.buffers_grow else most_bytes[name]
        return direction.workspace.take(name, (rows, columns), dtype, device, most)

    for at, (move, stage) in enumerate(zip(chain.moves, stages, strict=True)):
        leaves, arrives, dtype = move.leaves, move.arrives, dtypes[not move.is_first]
        taken, into = target if move.is_kept else held, target
        if not move.is_last:
            into = [take("send" if sums else "receive", arrives.end, dtypes[1])]
        if stage is not None:
            # Else they lie in the buffer that the next rows go to.
            may_stay = sums or move.is_first or move.is_kept
            if may_stay and leaves.in_place is not None:
                sent = leaves.view(taken)
            else:
                sent = take("send", leaves.rows, dtype)
                table.pack(leaves, taken, sent)
            in_place = not sums and arrives.in_place is not None
            arrived = arrives.view(into) if in_place else take("receive", arrives.rows, dtype)
            stage.all_to_all(arrived, sent, move.received_P, move.sent_P)
            direction.count(stage, move.received_P, columns * dtype.itemsize)
            yield any(stages[at + 1 :])
            if sums:
                table.add(arrives, arrived, into, adds=move.is_last)
            elif not in_place:
                table.unpack(arrives, arrived, into)
        elif sums:
            table.add(arrives, taken[0], into, adds=move.is_last)
        else:
            table.pack(leaves, taken, into[0])
        held = into


def wire_dtype(config: FSEPConfig) -> torch.dtype | None:
    """Return the dtype of gradients between hops; None for a reduce's own."""
    return None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]
