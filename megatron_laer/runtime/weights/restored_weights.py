"""Whole matrices of one layer's slots while they are in use.

Memory of whole weights is allocated and freed only here.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.steps import Steps
from megatron_laer.runtime.comm.streams import Pending
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Share, restored_bytes
from megatron_laer.runtime.weights.states import ExpertsState, WeightState
from megatron_laer.telemetry.activities import Activity, Kind


class RestoredWeights:
    """Matrices `[C, R, K]` of one layer's replica slots.

    They have the form in which they are carried; `shapes` are those of their gradients. Without a
    replica in the layout nothing is fetched, and no memory is taken. Where payloads serve one
    direction, a pass has two of these, whose shares differ.
    """

    def __init__(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        streams: ExchangeStreams,
    ) -> None:
        self.index = index
        self.state = ExpertsState(name)
        self.share = share
        self._name = name
        self._streams = streams
        self._matrices: tuple[Pending, ...] = ()
        self._heir: RestoredWeights | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(
            (self.index.placed.geometry.replica_slots, rows, columns)
            for rows, columns in zip(self.share.rows, self.share.columns, strict=True)
        )

    def start_restore(self) -> None:
        """Start to fetch the slots' experts, unless already started. Collective over the group."""
        if self.state.weights is not WeightState.SHARDED or not self.index.placed.has_replicas:
            return
        self.state.enter(WeightState.RESTORING)
        exchange, pool = self._streams.exchange, self._streams.weights
        exchanges = [
            # The present weights: they change between steps only.
            exchange.restore_steps(
                source,
                self.index,
                carried.rows,
                out=pool.take(
                    (self.index.placed.geometry.replica_slots, carried.rows, carried.columns),
                    carried.dtype,
                    like.device,
                ),
            )
            for source, like, carried in zip(
                self._sources(), self.share.likes, self.share.carried, strict=True
            )
        ]
        activity = Activity(Kind.RESTORE, self._name)
        self._streams.gradients.go_on()  # a reduce started before the attention's backward
        self._matrices = self._streams.parameters.submit_exchanges(exchanges, activity)
        exchange.count.restores += 1

    def change(self, index: LayoutIndex) -> None:
        """Switch to another layout, and fetch only slots that differ. Collective once started."""
        before, self.index = self.index, index
        if self.state.weights is WeightState.SHARDED or index is before:
            return
        if not index.placed.has_replicas:
            self.free()
            return
        self.state.enter(WeightState.RESTORING)
        exchanges = [
            self._update(source, index, carried.rows, before, pending)
            for source, carried, pending in zip(
                self._sources(), self.share.carried, self._matrices, strict=True
            )
        ]
        activity = Activity(Kind.CHANGE, self._name)
        self._matrices = self._streams.parameters.submit_exchanges(exchanges, activity)
        self._streams.exchange.count.changes += 1

    def matrix(self, position: int) -> torch.Tensor:
        self.start_restore()
        matrix_CRK = self._matrices[position].wait()
        if self.state.weights is WeightState.RESTORING:
            self.state.enter(WeightState.RESTORED)
        return matrix_CRK

    def fetch(self, following: RestoredWeights) -> None:
        """Start the restore of the weights that are used next, or hand these on to them."""
        if following is not self and following.state.weights is not WeightState.SHARDED:
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
        if self._heir is None and self.state.weights is not WeightState.SHARDED:
            num_bytes = restored_bytes(self.share, self.index.placed.geometry.replica_slots)
            if self._streams.kept.take(self, num_bytes):
                self._heir = self

    def used(self) -> None:
        heir, self._heir = self._heir, None
        if heir is self:
            return
        restored = self.state.weights is not WeightState.SHARDED
        if heir is not None and restored and heir.state.weights is WeightState.SHARDED:
            heir._take_over(self)
        self.free()

    def free(self) -> None:
        if self.state.weights is not WeightState.SHARDED:
            for pending in self._matrices:
                self._streams.weights.put_back(pending.wait())
            self._matrices = ()
            self.state.enter(WeightState.SHARDED)
            self._streams.kept.give_back(self)

    def _take_over(self, other: RestoredWeights) -> None:
        """Inherit the other pass's weights. Collective over the group if the layouts differ."""
        other.state.enter(WeightState.SHARDED)
        self._streams.kept.give_back(other)
        self._matrices, other._matrices = other._matrices, ()
        self.state.enter(WeightState.RESTORING)
        index, self.index = self.index, other.index
        self.change(index)

    def _sources(self) -> tuple[Any, ...]:
        return self.share.sources(self.index.placed.layout.num_experts)

    def _update(
        self,
        source: Any,
        index: LayoutIndex,
        rows: int,
        before: LayoutIndex,
        pending: Pending,
    ) -> Steps:
        """Update a matrix on `pending`'s communication stream, hence after it."""
        exchange, present = self._streams.exchange, pending.result()
        return (yield from exchange.restore_steps(source, index, rows, before=before, out=present))
