"""Gradients of one layer's slots, on their way to the ranks' shares.

Memory of whole gradients is allocated and freed only here. With `--fsep-restore step` a layer's
float32 sums over the passes of a step are too.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from megatron_laer.runtime.comm.streams import Pending, has_streams
from megatron_laer.runtime.weights.autograd import placeholder
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.states import GradState
from megatron_laer.telemetry.activities import Activity, Kind


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
        self._compute: torch.cuda.Stream | None = None
        self._delayed: dict[int, tuple[torch.Tensor, Callable[[torch.Tensor], None]]] = {}
        self._arriving: tuple[Pending, ...] = ()
        self._num_passes = self._left = 0
        self._sums_CRK: list[torch.Tensor] = []

    def begin_step(self, num_passes: int) -> None:
        """Begin a step whose passes are summed."""
        self._num_passes = self._left = num_passes

    def new(self, position: int) -> torch.Tensor:
        like = self.share.likes[position]
        grad_CRK = self._streams.grads.take(self._weights.shapes[position], like.dtype, like.device)
        self._written_CRK.append(grad_CRK)
        self._compute = torch.cuda.current_stream() if has_streams(like.device) else None
        return grad_CRK

    def delay(self, position: int, compute: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Keep the computation of a matrix's gradients for `compute_delayed`; return zeros."""
        assert position not in self._delayed, (
            f"{self._name}: the last pass's delayed weight gradients were not computed"
        )
        self._delayed[position] = self.new(position), compute
        return placeholder(self.share.likes[position].detach(), self._weights.shapes[position])

    @torch.no_grad()
    def compute_delayed(self, grads_CRK: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Compute the delayed gradients, which take the place of zeros in `grads_CRK`.

        Perhaps on a stream of its own, for which the compute stream waits before the reduce. So
        the operands are kept until then.
        """
        computed = list(grads_CRK)
        for at, position in enumerate(self.share.trained_at):
            if position in self._delayed:
                computed[at], compute = self._delayed[position]
                compute(computed[at])
        return tuple(computed)

    def defer(self, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        self.state.enter(GradState.DEFERRED)
        self._deferred_CRK = grads_CRK

    def let_go(self, *, sums: bool) -> None:
        """Add the deferred gradients to the step's, or send them, on the stream they are from."""
        assert self._deferred_CRK, "tokens' gradients arrived before the experts had any"
        grads_CRK, self._deferred_CRK = self._deferred_CRK, ()
        # Megatron may exchange tokens' gradients on a stream of its own.
        computes = None if self._compute is None else torch.cuda.stream(self._compute)
        with computes or contextlib.nullcontext():
            (self.add if sums else self.start_reduce)(grads_CRK)

    def add(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Add a pass's gradients; send the sum with the last one. Collective then."""
        if not self._sums_CRK:
            self._sums_CRK = [
                self._streams.grads.take(tuple(grad.shape), torch.float32, grad.device).copy_(grad)
                for grad in grads_CRK
            ]
        else:
            for sum_CRK, grad_CRK in zip(self._sums_CRK, grads_CRK, strict=True):
                sum_CRK.add_(grad_CRK)
        self.state.enter(GradState.SUMMED)
        self._delayed.clear()
        self.free()
        self._left -= 1
        if self._left == 0:
            self._written_CRK, self._sums_CRK = self._sums_CRK, []
            self.start_reduce(self._written_CRK)
            self._left = self._num_passes  # Megatron's rerun state machine repeats steps

    def start_reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Start to send whole gradients to the ranks' shares. Collective over the group."""
        self.state.enter(GradState.REDUCING)
        self._delayed.clear()
        exchange, index = self._streams.exchange, self._weights.index
        exchanges = [
            exchange.reduce_steps(
                grad_CRK,
                index,
                # A step's float32 sums cross nodes in a microbatch's dtype.
                wire_dtype=self.share.likes[at].dtype,
                add_to=self.share.grad_target(at, index.placed.geometry.num_experts),
            )
            for grad_CRK, at in zip(grads_CRK, self.share.trained_at, strict=True)
        ]
        activity = Activity(Kind.REDUCE, self._name)
        self._arriving = self._streams.gradients.submit_exchanges(exchanges, activity)
        self._streams.parameters.go_on()  # a restore started before the experts' backward
        exchange.count.reduces += 1

    def finish_reduce(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of the parameters.

        Wait for the sums over replicas, of passes that are summed only if they are being reduced.
        """
        if self._num_passes and self.state.grads is not GradState.REDUCING:
            return self.share.added()
        self.state.enter(GradState.NONE)
        sums = tuple(pending.wait() for pending in self._arriving)
        self._arriving = ()
        self.free()
        return self.share.reduced(sums)

    def free(self) -> None:
        for grad_CRK in self._written_CRK:
            self._streams.grads.put_back(grad_CRK)
        self._written_CRK.clear()
