"""Memory of a layer's slots: weights, which a restore fills, and gradients, which a reduce sends.

It is allocated and freed only here. With `--fsep-restore step` that includes float32 sums of a
layer's gradients over the passes of a step.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.streams import CommStream, Pending, Steps, has_streams
from megatron_laer.runtime.weights.autograd import Gradients, placeholder
from megatron_laer.runtime.weights.share import Share
from megatron_laer.telemetry.activities import Activity, Kind


@dataclass(frozen=True)
class ExchangeStreams:
    """Exchange of all layers, its streams, its buffers of results and payloads, and kept weights.

    Attributes:
        most_kept_bytes: of weights that stay until backward, the first ones of a step that fit. All
            ranks of a group keep the same ones, since sizes are equal.
        kept: those weights, and their bytes.
        observers: of what compute and optimizers get from exchanges.
    """

    exchange: Exchange
    parameters: CommStream
    gradients: CommStream
    most_kept_bytes: float = 0
    weights: BufferPool = field(default_factory=BufferPool)
    grads: BufferPool = field(default_factory=BufferPool)
    payloads: BufferPool = field(default_factory=BufferPool)
    kept: dict[RestoredWeights, int] = field(default_factory=dict)
    observers: list[Observer] = field(default_factory=list)

    def close(self) -> None:
        self.parameters.close()
        self.gradients.close()


class Observer(Protocol):
    """Checks of exchanges, on the streams that use what they bring."""

    def reads(
        self, weights: RestoredWeights, matrices: Sequence[torch.Tensor], direction: str
    ) -> None:
        """Look at restored matrices `[C, R, K]`, where compute reads them first."""
        ...

    def sends(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        slots_CRK: torch.Tensor,
        sums: Sequence[torch.Tensor],
    ) -> Callable[[], None]:
        """Look at gradients that leave, and return a look at where they have arrived.

        Args:
            sums: new ones for autograd; empty where main gradients take them.
        """
        ...


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
        self._is_read = False
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
        form, streams = self.share.form, self._streams
        shape = self.replica_slots, *form.shape
        out = streams.weights.take(shape, form.dtype, self.share.device)
        streams.gradients.go_on()  # a reduce started before the attention's backward
        self._submit(Kind.RESTORE, lambda: out)
        streams.exchange.count.restores += 1

    def change(self, index: LayoutIndex) -> None:
        """Switch to another layout, and fetch only slots that differ. Collective once started."""
        before, self.index = self.index, index
        pending = self._pending
        if pending is None or index is before:
            return
        if not index.placed.has_replicas:
            self.free()
            return
        self._submit(Kind.CHANGE, pending.result, before)
        self._streams.exchange.count.changes += 1

    def _submit(
        self, kind: Kind, out: Callable[[], torch.Tensor], before: LayoutIndex | None = None
    ) -> None:
        """Fetch experts on the communication stream, hence after those that are on their way."""
        share, index, exchange = self.share, self.index, self._streams.exchange

        def steps() -> Steps:
            with self._streams.payloads.lent() as memory:
                # The present weights: they change between steps only.
                weights, matrices = share.weights(memory), share.form.matrices
                made = exchange.restore_steps(weights, index, matrices, out=out(), before=before)
                return (yield from made)

        activity = Activity(kind, self.name)
        self._is_read = False
        self._pending = self._streams.parameters.submit_exchange(steps(), activity)

    def matrix(self, position: int, direction: str = "forward") -> torch.Tensor:
        """Return a matrix once it is there, in forward and in backward: autograd saves none."""
        self.start_restore()
        assert self._pending is not None
        slots_CRK = self._pending.wait()
        if not self._matrices:
            self._matrices = self.share.form.split(slots_CRK)
        if not self._is_read:
            self._is_read = True
            for observer in self._streams.observers:
                observer.reads(self, self._matrices, direction)
        return self._matrices[position]

    def fetch(self, following: RestoredWeights | None, *, starts: bool = True) -> None:
        """Hand these on to the weights that are used next, if any, or start their restore.

        Args:
            starts: false to leave the restore of another layer's to their own turn.
        """
        if following is None or (following is not self and following.are_here):
            return  # kept since its forward, or at work for it
        stays = self._heir is self
        if following.share is self.share and self.index.placed.has_replicas and not stays:
            self.hand_on(following)
        elif starts:
            following.start_restore()

    def hand_on(self, following: RestoredWeights | None) -> None:
        """Hand the weights on to the layer's following pass after this one has used them.

        The following pass may be the backward of this one, which has the same weights. With None
        nothing follows.
        """
        self._heir = following

    def stay(self) -> None:
        """Leave the weights of a forward that is under way to its backward, which comes next."""
        if self.are_here and self._heir is None and self not in self._streams.kept:
            self._heir = self

    def keep(self) -> None:
        """Keep the weights for this pass's backward if they fit, unless they are handed on."""
        streams = self._streams
        if self._heir is None and self.are_here:
            num_bytes = self.share.restored_bytes(self.replica_slots)
            if sum(streams.kept.values()) + num_bytes <= streams.most_kept_bytes:
                streams.kept[self] = num_bytes
                self._heir = self

    def used(self) -> None:
        """Free or hand on the weights. Collective over the group if the heir's layout differs."""
        heir, self._heir = self._heir, None
        if heir is self:
            self._is_read = False  # until backward
            return
        if heir is None or heir.are_here or not self.are_here:
            self.free()
            return
        heir._pending, heir._is_read = self._leave(), False
        index, heir.index = heir.index, self.index
        heir.change(index)

    def free(self) -> None:
        if (pending := self._leave()) is not None:
            self._streams.weights.put_back(pending.wait())

    def _leave(self) -> Pending | None:
        self._streams.kept.pop(self, None)
        pending, self._pending, self._matrices = self._pending, None, []
        return pending


class SlotGrads:
    """Gradients `[C, R, K]` of one layer's slots, on their way to the ranks' shares.

    Once complete, they wait for `let_go`, which follows the tokens' gradients.
    """

    def __init__(self, weights: RestoredWeights, streams: ExchangeStreams) -> None:
        self.name = weights.name
        self._share = weights.share
        self._weights = weights
        self._streams = streams
        # Gradients of all trained matrices, as they are exchanged, and matrices still to write.
        self._slots_CRK: torch.Tensor | None = None
        self._unwritten: dict[int, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None  # that computes them
        self._delayed: list[Callable[[], None]] = []
        self._computed: list[Callable[[], None]] = []
        self._new_sums: tuple[torch.Tensor, ...] = ()
        self._observed: list[Callable[[], None]] = []
        self._arriving: Pending | None = None
        self._num_passes = self._left = 0
        self._sums_CRK: torch.Tensor | None = None

    @property
    def are_complete(self) -> bool:
        """Whether a pass's gradients are computed, and have not left."""
        left_to_do = self._slots_CRK is None or self._unwritten or self._delayed
        return not (left_to_do or self.are_leaving)

    @property
    def are_leaving(self) -> bool:
        """Whether a reduce is under way."""
        return self._arriving is not None

    def begin_step(self, num_passes: int) -> None:
        """Begin a step whose passes are summed; those of a step that an error ended are dropped."""
        if self._arriving is not None:  # its memory is not to be lent before
            self._arriving.wait()
            self._arriving = None
        self.free()
        self._slots_CRK, self._sums_CRK = self._sums_CRK, None
        self.free()
        self._num_passes = self._left = num_passes

    def new(self, position: int) -> torch.Tensor:
        """Return memory for a matrix's gradients, which the caller writes."""
        share = self._share
        if self._slots_CRK is None:
            self._slots_CRK = self._take(share.grads_form.dtype)
            matrices = share.grads_form.split(self._slots_CRK)
            self._unwritten = dict(zip(share.trained_at, matrices, strict=True))
            self._stream = torch.cuda.current_stream() if has_streams(share.device) else None
        assert position in self._unwritten, f"{self.name}: the last pass's gradients have not left"
        return self._unwritten.pop(position)

    def write(
        self, position: int, compute: Callable[[torch.Tensor], None], *, delays: bool
    ) -> torch.Tensor:
        """Compute a matrix's gradients, or return zeros and leave that to `compute_delayed`."""
        grads_CRK = self.new(position)
        if delays:
            self._delayed.append(partial(compute, grads_CRK))
            return placeholder(grads_CRK, grads_CRK.shape)
        compute(grads_CRK)
        return grads_CRK

    @torch.no_grad()
    def compute_delayed(self) -> None:
        """Compute the delayed gradients.

        Perhaps on a stream of its own, for which the compute stream waits before the reduce. So
        the operands are kept until then.
        """
        self._computed, self._delayed = self._delayed, []
        for compute in self._computed:
            compute()

    def receive(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Copy the gradients of trained matrices that nothing has written, which are zeros."""
        for position, grad_CRK in zip(self._share.trained_at, grads_CRK, strict=True):
            if self._slots_CRK is None or position in self._unwritten:
                self.new(position).copy_(grad_CRK)

    def let_go(self, *, sums: bool) -> None:
        """Add the complete gradients to the step's, or send them, on the stream they are from.

        Collective if they are sent: a step's with its last pass.
        """
        assert self.are_complete, f"{self.name}: tokens' gradients arrived before the experts'"
        # Megatron may exchange tokens' gradients on a stream of its own.
        with torch.cuda.stream(self._stream):
            if not sums or self._add():
                self.start_reduce()

    def _add(self) -> bool:
        """Add a pass's gradients to the step's; return True if the sums are complete."""
        assert self._slots_CRK is not None
        if self._sums_CRK is None:
            self._sums_CRK = self._take(torch.float32)
            self._sums_CRK.copy_(self._slots_CRK)
        else:
            self._sums_CRK.add_(self._slots_CRK)
        self.free()
        self._left -= 1
        if self._left:
            return False
        self._left = self._num_passes  # Megatron's rerun state machine repeats steps
        self._slots_CRK, self._sums_CRK = self._sums_CRK, None
        return True

    def start_reduce(self) -> None:
        """Start to send whole gradients to the ranks' shares. Collective over the group."""
        share, exchange = self._share, self._streams.exchange
        assert self._slots_CRK is not None and not self.are_leaving
        self._computed.clear()
        self._new_sums = share.new_sums()
        sent = self.name, share, self._weights.index, self._slots_CRK, self._new_sums
        self._observed = [observer.sends(*sent) for observer in self._streams.observers]
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

    def finish_reduce(self) -> Gradients:
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
        reduced = self._share.reduced(sums)
        for arrived in self._observed:
            arrived()
        return reduced

    def _take(self, dtype: torch.dtype) -> torch.Tensor:
        shape = self._weights.replica_slots, *self._share.grads_form.shape
        return self._streams.grads.take(shape, dtype, self._share.device)

    def free(self) -> None:
        if self._slots_CRK is not None:
            self._streams.grads.put_back(self._slots_CRK)
        self._slots_CRK = None
        self._unwritten.clear()
        self._computed.clear()
