"""Gradients of one layer's slots, on their way to the ranks' shares.

Memory of whole gradients is allocated and freed only here. With `--fsep-restore step` a layer's
float32 sums over the passes of a step are too.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_laer.runtime.comm.streams import Pending, has_streams
from megatron_laer.runtime.weights.autograd import placeholder
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.telemetry.activities import Activity, Kind

GradsReady = Callable[[Sequence[torch.nn.Parameter]], None]


@dataclass(eq=False)
class LateGrads:
    """Gradients of a layer that are complete after autograd has asked for them, for all passes.

    Attributes:
        computes: for each pass whose input gradients are computed, oldest first, the function
            that `backward_dw` calls for those of the weights.
        report: reports parameters of stock's modules whose main gradients have the sums over
            replicas, after stock's own report without these; None outside of steps.
    """

    computes: deque[Callable[[], None]] = field(default_factory=deque)
    report: GradsReady | None = None


class SlotGrads:
    """Gradients `[C, R, K]` of one layer's slots.

    `are_complete` once they are computed, until the tokens' gradients have arrived as well.
    """

    def __init__(self, weights: RestoredWeights, streams: ExchangeStreams) -> None:
        self.name = weights.name
        self.are_complete = False
        self._share = weights.share
        self._weights = weights
        self._streams = streams
        # Gradients of all trained matrices, as they are exchanged, and those of each one.
        self._slots_CRK: torch.Tensor | None = None
        self._matrices: dict[int, torch.Tensor] = {}
        self._written: set[int] = set()
        self._compute: torch.cuda.Stream | None = None
        self._delayed: dict[int, Callable[[torch.Tensor], None]] = {}
        self._new_sums: tuple[torch.Tensor, ...] = ()
        self._arriving: Pending | None = None
        self._num_passes = self._left = 0
        self._sums_CRK: torch.Tensor | None = None

    @property
    def are_leaving(self) -> bool:
        """Whether a reduce is under way."""
        return self._arriving is not None

    def begin_step(self, num_passes: int) -> None:
        """Begin a step whose passes are summed."""
        self._num_passes = self._left = num_passes

    def new(self, position: int) -> torch.Tensor:
        """Return memory for a matrix's gradients, which the caller writes."""
        if self._slots_CRK is None:
            form, device = self._share.grads_form, self._share.likes[0].device
            shape = self._weights.replica_slots, *form.shape
            self._slots_CRK = self._streams.grads.take(shape, form.dtype, device)
            matrices = form.split(self._slots_CRK)
            self._matrices = dict(zip(self._share.trained_at, matrices, strict=True))
            self._compute = torch.cuda.current_stream() if has_streams(device) else None
        self._written.add(position)
        return self._matrices[position]

    def write(
        self, position: int, compute: Callable[[torch.Tensor], None], *, delays: bool
    ) -> torch.Tensor:
        """Compute a matrix's gradients, or return zeros and leave that to `compute_delayed`."""
        grads_CRK = self.new(position)
        if not delays:
            compute(grads_CRK)
            return grads_CRK
        assert position not in self._delayed, (
            f"{self.name}: the last pass's delayed weight gradients were not computed"
        )
        self._delayed[position] = compute
        return placeholder(grads_CRK, grads_CRK.shape)

    @torch.no_grad()
    def compute_delayed(self) -> None:
        """Compute the delayed gradients, which then wait for the tokens' gradients.

        Perhaps on a stream of its own, for which the compute stream waits before the reduce. So
        the operands are kept until then.
        """
        for position, compute in self._delayed.items():
            compute(self._matrices[position])
        self.defer()

    def receive(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Copy the gradients of trained matrices that nothing has written, which are zeros."""
        for position, grad_CRK in zip(self._share.trained_at, grads_CRK, strict=True):
            if position not in self._written:
                self.new(position).copy_(grad_CRK)

    def defer(self) -> None:
        """Hold the gradients until `let_go`."""
        assert not self.are_complete, f"{self.name}: the last pass's gradients have not left"
        self.are_complete = True

    def let_go(self, *, sums: bool) -> None:
        """Add the deferred gradients to the step's, or send them, on the stream they are from."""
        assert self.are_complete, "tokens' gradients arrived before the experts had any"
        self.are_complete = False
        # Megatron may exchange tokens' gradients on a stream of its own.
        computes = None if self._compute is None else torch.cuda.stream(self._compute)
        with computes or contextlib.nullcontext():
            (self.add if sums else self.start_reduce)()

    def add(self) -> None:
        """Add a pass's gradients; send the sum with the last one. Collective then."""
        slots_CRK = self._slots_CRK
        assert slots_CRK is not None
        if self._sums_CRK is None:
            shape, device = tuple(slots_CRK.shape), slots_CRK.device
            self._sums_CRK = self._streams.grads.take(shape, torch.float32, device)
            self._sums_CRK.copy_(slots_CRK)
        else:
            self._sums_CRK.add_(slots_CRK)
        self.free()
        self._left -= 1
        if self._left == 0:
            self._slots_CRK, self._sums_CRK = self._sums_CRK, None
            self.start_reduce()
            self._left = self._num_passes  # Megatron's rerun state machine repeats steps

    def start_reduce(self) -> None:
        """Start to send whole gradients to the ranks' shares. Collective over the group."""
        share, exchange = self._share, self._streams.exchange
        assert self._slots_CRK is not None and not self.are_leaving
        self._delayed.clear()
        self._new_sums = share.new_sums()
        steps = exchange.reduce_steps(
            self._slots_CRK,
            self._weights.index,
            share.grads_form.matrices,
            # A step's float32 sums cross nodes in a microbatch's dtype.
            wire_dtype=share.grads_form.dtype,
            add_to=share.sums_in_rows(self._new_sums),
        )
        activity = Activity(Kind.REDUCE, self.name)
        self._arriving = self._streams.gradients.submit_exchange(steps, activity)
        self._streams.parameters.go_on()  # a restore started before the experts' backward
        exchange.count.reduces += 1

    def finish_reduce(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of the parameters.

        Wait for the sums over replicas, of passes that are summed only if they are being reduced.
        """
        if self._arriving is None:
            assert self._num_passes, f"{self.name}: no reduce is under way"
            return self._share.added()
        self._arriving.wait()
        self._arriving = None
        self.free()
        sums, self._new_sums = self._new_sums, ()
        return self._share.reduced(sums)

    def free(self) -> None:
        if self._slots_CRK is not None:
            self._streams.grads.put_back(self._slots_CRK)
        self._slots_CRK = None
        self._matrices.clear()
        self._written.clear()
        self._delayed.clear()
