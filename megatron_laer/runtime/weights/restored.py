"""Whole experts of one layer for one microbatch, alive only while something computes with them.

Restored weights are not saved by autograd. A forward pass drops them when it is done, and the
backward pass restores them again for the experts' backward; only a pass whose backward follows at
once (the re-run under a checkpoint) keeps them. When an exchange starts is the scheduler's
business; this file holds what is in flight, and `restored_nodes` the autograd nodes between slices
and experts.

Legend: E experts, C slots per rank, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_laer.runtime.comm.buffer_pool import BufferPool
from megatron_laer.runtime.comm.hierarchical import HierarchicalExchange, ReusableWeights
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.streams import CommStream, Pending
from megatron_laer.runtime.weights.autograd import (
    Arrive,
    ArriveAfter,
    AtBackward,
    Restore,
    placeholder,
)


@dataclass(frozen=True)
class Slices:
    """What this rank holds of every expert of a layer.

    Attributes:
        parameters: `[E, r, K]` for each matrix.
        rows: R of each matrix.
    """

    parameters: tuple[torch.nn.Parameter, ...]
    rows: tuple[int, ...]

    @property
    def have_main_grads(self) -> bool:
        """Whether Megatron's data-parallel wrapper keeps their gradients."""
        return all(hasattr(parameter, "main_grad") for parameter in self.parameters)


@dataclass(frozen=True)
class ExchangeStreams:
    """The exchanges, the lanes that they run on, and the memory that they fill.

    Attributes:
        weights: restored matrices; as many as the schedule restores layers at once.
        grads: gradients of restored matrices, likewise.
        reduced: gradients of slices, on their way to Megatron's main gradients.
        stand_ins: zeros in the shapes of slices, see `mark_in_main_grad`.
    """

    exchange: HierarchicalExchange
    parameters: CommStream
    gradients: CommStream
    weights: BufferPool = field(default_factory=BufferPool)
    grads: BufferPool = field(default_factory=BufferPool)
    reduced: BufferPool = field(default_factory=BufferPool)
    stand_ins: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def mark_in_main_grad(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Mark a parameter whose gradient is in its main gradient; what autograd is given instead.

        Megatron looks at the mark when autograd is done with the parameter, and takes it off at
        each step. A new tensor on whole memory is taken as it is; a placeholder would be copied.
        """
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        kind = parameter.shape, parameter.dtype
        if kind not in self.stand_ins:
            self.stand_ins[kind] = torch.zeros_like(parameter, requires_grad=False)
        return self.stand_ins[kind].detach()

    def close(self) -> None:
        """End both lanes."""
        self.parameters.close()
        self.gradients.close()


class RestoredExperts:
    """The slots' matrices `[C, R, K]` of one layer for one microbatch, and how to get them.

    Attributes:
        index: the layout that they are restored under.
        before: the MoE layer before in the same chunk and microbatch, which backward comes to next.
        tickets: the early `Arrive` node's outputs, until `weight_tickets` takes them.
        arrives_after: whether an `ArriveAfter` takes the gradients.
        sends_after: whether the tokens' gradients send those of the pass that is to come.
    """

    def __init__(
        self, name: str, slices: Slices, index: LayoutIndex, lanes: ExchangeStreams
    ) -> None:
        self.index = index
        self.before: RestoredExperts | None = None
        self.tickets: tuple[torch.Tensor, ...] | None = None
        self.arrives_after = False
        self.sends_after = False
        self._held_CRK: tuple[torch.Tensor, ...] | None = None
        self._name = name
        self._slices = slices
        self._lanes = lanes
        self._matrices: tuple[Pending, ...] | None = None
        self._grads: list[torch.Tensor] = []
        self._reduced: tuple[Pending, ...] | None = None

    def start(self) -> None:
        """Begin to fetch the slots' experts, unless that was begun. Collective over the group."""
        if self._matrices is None:
            exchange, weights = self._lanes.exchange, self._lanes.weights
            self._matrices = tuple(
                self._lanes.parameters.submit(
                    # The slices as they are now: they change between steps only.
                    partial(
                        exchange.restore,
                        slice_ErK.detach(),
                        self.index,
                        rows,
                        out=weights.take(shape, slice_ErK.dtype, slice_ErK.device),
                    ),
                    f"restore {self._name}",
                )
                for slice_ErK, rows, shape in zip(
                    self._slices.parameters, self._slices.rows, self._shapes(), strict=True
                )
            )
            exchange.count.restores += 1

    def start_backward(self) -> None:
        """Begin to fetch what this layer's backward needs, and the next one's behind it."""
        self.start()
        if self.before is not None:
            self.before.start()

    def change(self, index: LayoutIndex) -> None:
        """Follow another layout; of what was begun, only slots that differ are fetched again.

        Collective over the group if `start` was.
        """
        before, self.index = self.index, index
        if self._matrices is not None and index is not before:
            self._matrices = tuple(
                self._lanes.parameters.submit(
                    partial(self._update, slice_ErK.detach(), index, rows, before, pending),
                    f"change {self._name}",
                )
                for slice_ErK, rows, pending in zip(
                    self._slices.parameters, self._slices.rows, self._matrices, strict=True
                )
            )
            self._lanes.exchange.count.changes += 1

    def matrix(self, position: int) -> torch.Tensor:
        """The `position`-th matrix of every slot, waiting for it."""
        self.start()
        assert self._matrices is not None
        return self._matrices[position].wait()

    def release(self) -> None:
        """Let go of the restored matrices."""
        if self._matrices is not None:
            for pending in self._matrices:
                self._lanes.weights.put_back(pending.wait())
            self._matrices = None

    def new_grad(self, like_CRK: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of a matrix, whose content `reduce` will send."""
        grad_CRK = self._lanes.grads.take(tuple(like_CRK.shape), like_CRK.dtype, like_CRK.device)
        self._grads.append(grad_CRK)
        return grad_CRK

    def reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Begin to send the experts' gradients to their slices. Collective over the group."""
        exchange = self._lanes.exchange
        self._reduced = tuple(
            self._lanes.gradients.submit(
                partial(
                    exchange.reduce,
                    grad_CRK,
                    self.index,
                    # A step's sums are float32, and cross nodes as one microbatch's would.
                    wire_dtype=slice_ErK.dtype,
                    out=self._new_reduced(slice_ErK, grad_CRK.dtype),
                ),
                f"reduce {self._name}",
            )
            for grad_CRK, slice_ErK in zip(grads_CRK, self._slices.parameters, strict=True)
        )
        exchange.count.reduces += 1

    def reduced(self) -> tuple[torch.Tensor, ...]:
        """What autograd hands to the slices `[E, r, K]`, waiting for their gradients.

        Where Megatron keeps main gradients, these receive them here, so that the memory they
        arrived in is used again; autograd is given stand-ins, as by Megatron's own fused kernels.
        """
        assert self._reduced is not None, "gradients asked for before they were sent"
        grads_ErK = tuple(pending.wait() for pending in self._reduced)
        self._reduced = None
        self._give_grads()
        return tuple(map(self._hand_over, self._slices.parameters, grads_ErK))

    def issue_tickets(self) -> tuple[torch.Tensor, ...]:
        """Make the node at which this layer's gradients will be waited for.

        The earlier in forward, the later in backward.
        """
        tickets: tuple[torch.Tensor, ...] = Arrive.apply(self, *self._slices.parameters)
        return tickets

    def arrive_after(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mark hidden states: when their gradient is there, this layer's gradients are waited for.

        Whatever uses the hidden states must use the marked ones.
        """
        self.arrives_after = True
        marked: torch.Tensor = ArriveAfter.apply(self, hidden, *self._slices.parameters)
        return marked

    def send_after(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark what is dispatched: when its gradient is there, this layer's gradients are sent.

        Unless nobody waits for them later than that, or experts or tokens need no gradient.
        """
        tickets = self.tickets or ()
        waits_later = self.arrives_after or any(ticket.requires_grad for ticket in tickets)
        if not (waits_later and torch.is_grad_enabled() and tokens.requires_grad):
            return tokens
        self.sends_after = True
        marked: torch.Tensor = AtBackward.apply(tokens, self.send_held)
        return marked

    def hold(self, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        """Keep gradients until `send_held`."""
        self._held_CRK = grads_CRK

    def send_held(self) -> None:
        """Begin to send them. Collective over the group."""
        assert self._held_CRK is not None, "tokens' gradients arrived before the experts had any"
        held_CRK, self._held_CRK = self._held_CRK, None
        self.reduce(held_CRK)

    def weight_tickets(self) -> tuple[torch.Tensor, ...]:
        """What the experts' linear layers take for their weights: they lead gradients back here."""
        tickets, self.tickets = self.tickets, None
        if self.arrives_after:
            # Gradients take the other way; these only make autograd run `Restore`.
            tickets = tuple(
                placeholder(slice_ErK.detach(), slice_ErK.shape).requires_grad_()
                for slice_ErK in self._slices.parameters
            )
        elif tickets is None:
            tickets = self.issue_tickets()
        sends_after, self.sends_after = self.sends_after, False
        weights: tuple[torch.Tensor, ...] = Restore.apply(
            self, self._shapes(), sends_after, *tickets
        )
        return weights

    def before_backward(self, output: torch.Tensor) -> torch.Tensor:
        """Mark the experts' output: its gradient's arrival is when backward restores."""
        marked: torch.Tensor = AtBackward.apply(output, self.start_backward)
        return marked

    def _new_reduced(self, slice_ErK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        if not self._slices.have_main_grads:
            return None  # autograd accumulates it, and keeps its memory
        return self._lanes.reduced.take(tuple(slice_ErK.shape), dtype, slice_ErK.device)

    def _hand_over(self, slice_ErK: torch.nn.Parameter, grad_ErK: torch.Tensor) -> torch.Tensor:
        if not self._slices.have_main_grads:
            return grad_ErK
        slice_ErK.main_grad.add_(grad_ErK)  # type: ignore[attr-defined]
        self._lanes.reduced.put_back(grad_ErK)
        return self._lanes.mark_in_main_grad(slice_ErK)

    def _give_grads(self) -> None:
        for grad_CRK in self._grads:
            self._lanes.grads.put_back(grad_CRK)
        self._grads.clear()

    def _shapes(self) -> tuple[tuple[int, int, int], ...]:
        capacity = self.index.layout.capacity
        return tuple(
            (capacity, rows, slice_ErK.shape[2])
            for slice_ErK, rows in zip(self._slices.parameters, self._slices.rows, strict=True)
        )

    def _update(
        self,
        slice_ErK: torch.Tensor,
        index: LayoutIndex,
        rows: int,
        before: LayoutIndex,
        pending: Pending,
    ) -> torch.Tensor:
        """On the lane that `pending` was submitted to, hence after it."""
        reuse = ReusableWeights(before, pending.wait())
        return self._lanes.exchange.restore(slice_ErK, index, rows, reuse=reuse)
