"""Whole matrices of one layer's slots while they are in use.

Memory of whole weights is allocated and freed only here.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.streams import Pending, Steps
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.share import Share
from megatron_laer.telemetry.activities import Activity, Kind


class RestoredWeights:
    """Matrices `[C, R, K]` of one layer's replica slots.

    They have the form in which they are carried, and lie expert by expert in one buffer. Without a
    replica in the layout nothing is fetched, and no memory is taken. Where payloads serve one
    direction, a pass has two of these, whose shares differ.
    """

    def __init__(
        self, name: str, share: Share, index: LayoutIndex, streams: ExchangeStreams
    ) -> None:
        self.name = name
        self.share = share
        self.index = index
        self._streams = streams
        self._pending: Pending | None = None
        self._matrices: list[torch.Tensor] = []
        self._heir: RestoredWeights | None = None

    @property
    def are_here(self) -> bool:
        """Whether the slots have their memory: the weights are in it, or on their way."""
        return self._pending is not None

    @property
    def replica_slots(self) -> int:
        return self.index.placed.geometry.replica_slots

    def start_restore(self) -> None:
        """Start to fetch the slots' experts, unless already started. Collective over the group."""
        if self.are_here or not self.index.placed.has_replicas:
            return
        form, device = self.share.form, self.share.likes[0].device
        out = self._streams.weights.take((self.replica_slots, *form.shape), form.dtype, device)
        self._streams.gradients.go_on()  # a reduce started before the attention's backward
        # The present weights: they change between steps only.
        self._submit(self._restore(self.index, out), Kind.RESTORE)
        self._streams.exchange.count.restores += 1

    def change(self, index: LayoutIndex) -> None:
        """Switch to another layout, and fetch only slots that differ. Collective once started."""
        before, self.index = self.index, index
        if not self.are_here or index is before:
            return
        if not index.placed.has_replicas:
            self.free()
            return
        self._submit(self._update(index, before, self._pending), Kind.CHANGE)
        self._streams.exchange.count.changes += 1

    def matrix(self, position: int) -> torch.Tensor:
        self.start_restore()
        assert self._pending is not None
        slots_CRK = self._pending.wait()
        if not self._matrices:
            self._matrices = self.share.form.split(slots_CRK)
        return self._matrices[position]

    def fetch(self, following: RestoredWeights) -> None:
        """Start the restore of the weights that are used next, or hand these on to them."""
        if following is not self and following.are_here:
            return  # kept since its forward
        if following.share is self.share and self.index.placed.has_replicas:
            self.hand_on(following)
        else:
            following.start_restore()

    def hand_on(self, following: RestoredWeights | None) -> None:
        """Hand the weights on to the layer's following pass after this one has used them.

        The following pass may be the backward of this one, which has the same weights. With None
        nothing follows.
        """
        self._heir = following

    def keep(self) -> None:
        """Keep the weights for this pass's backward if they fit, unless they are handed on."""
        streams = self._streams
        if self._heir is None and self.are_here:
            num_bytes = self.share.restored_bytes(self.replica_slots)
            if sum(streams.kept.values()) + num_bytes <= streams.most_kept_bytes:
                streams.kept[self] = num_bytes
                self._heir = self

    def used(self) -> None:
        heir, self._heir = self._heir, None
        if heir is self:
            return
        if heir is not None and self.are_here and not heir.are_here:
            heir._take_over(self)
        self.free()

    def free(self) -> None:
        if self._pending is not None:
            self._streams.weights.put_back(self._pending.wait())
            self._leave()

    def _take_over(self, other: RestoredWeights) -> None:
        """Inherit the other pass's weights. Collective over the group if the layouts differ."""
        self._pending = other._pending
        other._leave()
        index, self.index = self.index, other.index
        self.change(index)

    def _leave(self) -> None:
        self._pending, self._matrices = None, []
        self._streams.kept.pop(self, None)

    def _submit(self, exchange: Steps, kind: Kind) -> None:
        activity = Activity(kind, self.name)
        self._pending = self._streams.parameters.submit_exchange(exchange, activity)

    def _restore(
        self, index: LayoutIndex, out: torch.Tensor, before: LayoutIndex | None = None
    ) -> Steps:
        share, exchange = self.share, self._streams.exchange
        return exchange.restore_steps(
            share.weights(), index, share.form.matrices, out=out, before=before
        )

    def _update(self, index: LayoutIndex, before: LayoutIndex, pending: Pending | None) -> Steps:
        """Update weights on `pending`'s communication stream, hence after it."""
        assert pending is not None
        return (yield from self._restore(index, pending.result(), before))
