"""The autograd nodes between a layer's slices and its restored experts.

Two nodes lie on the way of a layer's gradients: `Restore`, whose backward has whole gradients, and
one before it, whose backward hands the slices' gradients to Megatron. Between the two the gradients
are in flight; they leave when the tokens' gradients have arrived (an `AtBackward`), since the
backward pass waits for those. The second node is `Arrive`, or under a checkpoint `ArriveAfter`:

- Autograd runs ready nodes latest first, so an `Arrive` made early in forward, while the layer
  before was computing, waits only after that layer's backward.
- A checkpoint's backward is a backward pass of its own, at whose end all its nodes are done.
  `ArriveAfter` lies on the hidden states that enter the transformer layer, so it waits when their
  gradient is there, after the attention's backward.

What travels along the edges of this graph are placeholders of the right shape without storage:
weights and gradients themselves are held by `RestoredExperts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_laer.runtime.weights.restored import RestoredExperts


def placeholder(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros of this shape without storage, for the edges of autograd's graph."""
    return like.new_zeros(()).expand(shape)


class Arrive(torch.autograd.Function):
    """Backward: the slices' gradients, once they are here."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, restored: RestoredExperts, *slices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.restored = restored
        return tuple(placeholder(slice_ErK, slice_ErK.shape) for slice_ErK in slices)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (None, *ctx.restored.reduced())


class ArriveAfter(torch.autograd.Function):
    """Identity on hidden states. Backward: their gradient, and the slices' once they are here."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, restored: RestoredExperts, hidden: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        ctx.restored = restored
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (None, grad, *ctx.restored.reduced())


class AtBackward(torch.autograd.Function):
    """Identity, whose backward calls something when the gradient is there.

    An autograd node rather than a hook: it runs exactly once per backward, at the same place on
    every rank, also on a rank that received no token.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:  # type: ignore[override]
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.call()
        return grad, None


class Restore(torch.autograd.Function):
    """Backward: whole gradients out, on their way to the slices, now or after the tokens'."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        restored: RestoredExperts,
        shapes: tuple[tuple[int, int, int], ...],
        sends_after: bool,
        *tickets: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.restored, ctx.shapes = restored, tuple(ticket.shape for ticket in tickets)
        ctx.sends_after = sends_after
        return tuple(
            placeholder(ticket, shape) for ticket, shape in zip(tickets, shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.sends_after:
            ctx.restored.hold(grads)
        else:
            ctx.restored.reduce(grads)
        if ctx.restored.arrives_after:
            return (None,) * (3 + len(grads))
        return (
            None,
            None,
            None,
            *(placeholder(grad, shape) for grad, shape in zip(grads, ctx.shapes, strict=True)),
        )
