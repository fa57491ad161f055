"""Gradients of one layer's slots, on their way to the ranks' shares.

Memory of whole gradients is allocated and freed only here.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_laer.runtime.comm.streams import Pending
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.states import GradState
from megatron_laer.telemetry.trace_events import Activity, Kind


class SlotGrads:
    """Gradients `[C, R, K]` of one layer's slots."""

    def __init__(self, weights: RestoredWeights, streams: ExchangeStreams) -> None:
        self.state = weights.state
        self.share = weights.share
        self._name = weights.state.name
        self._weights = weights
        self._streams = streams
        self._written_CRK: list[torch.Tensor] = []
        self._deferred_CRK: tuple[torch.Tensor, ...] = ()
        self._arriving: tuple[Pending, ...] = ()

    def new(self, position: int) -> torch.Tensor:
        like = self.share.likes[position]
        grad_CRK = self._streams.grads.take(self._weights.shapes[position], like.dtype, like.device)
        self._written_CRK.append(grad_CRK)
        return grad_CRK

    def defer(self, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        self.state.enter(GradState.DEFERRED)
        self._deferred_CRK = grads_CRK

    def start_deferred(self) -> None:
        """Start to reduce the deferred gradients. Collective over the group."""
        assert self._deferred_CRK, "tokens' gradients arrived before the experts had any"
        grads_CRK, self._deferred_CRK = self._deferred_CRK, ()
        self.start_reduce(grads_CRK)

    def start_reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Start to send whole gradients to the ranks' shares. Collective over the group."""
        self.state.enter(GradState.REDUCING)
        exchange, index = self._streams.exchange, self._weights.index
        exchange.prepare_reduce(index)
        exchanges = [
            exchange.reduce_steps(
                grad_CRK,
                index,
                # A step's float32 sums cross nodes in a microbatch's dtype.
                wire_dtype=self.share.likes[at].dtype,
                add_to=self.share.grad_target(at, index.layout.num_experts),
            )
            for grad_CRK, at in zip(grads_CRK, self.share.trained_at, strict=True)
        ]
        activity = Activity(Kind.REDUCE, self._name)
        self._arriving = self._streams.gradients.submit_exchanges(exchanges, activity)
        self._streams.parameters.go_on()  # a restore started before the experts' backward
        exchange.count.reduces += 1

    def finish_reduce(self) -> tuple[torch.Tensor | None, ...]:
        """Wait for the sums over replicas, and return autograd's gradients of the parameters."""
        self.state.enter(GradState.NONE)
        sums = tuple(pending.wait() for pending in self._arriving)
        self._arriving = ()
        self.free()
        return self.share.reduced(sums)

    def free(self) -> None:
        for grad_CRK in self._written_CRK:
            self._streams.grads.put_back(grad_CRK)
        self._written_CRK.clear()
