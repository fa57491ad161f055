"""Autograd nodes between a layer's parameters and its restored experts.

A layer's gradients pass two nodes. The backward of `SlicesToSlots` receives the gradients of whole
matrices, and that of a second node hands the parameters' gradients to Megatron. In between, the
gradients are reduced. The reduce starts after the tokens' gradients have arrived (a `RunOnBackward`
at the dispatch), since the backward pass waits for those. The second node is a `WaitForGrads`:

- Autograd runs the newest node first. So a `WaitForGrads` created early in forward, during the
  previous layer's compute, waits only after that layer's backward.
- A checkpoint's backward is a backward pass of its own, at whose end all its nodes are done. There
  it is created as the transformer layer begins, and waits after the attention's backward.

The tensors on the edges of this graph are placeholders of the right shape without storage.
`RestoredWeights` and `SlotGrads` own weights and gradients; the nodes call their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

Shape = tuple[int, ...]
# Waits for the parameters' gradients, and returns autograd's gradients for them.
FinishReduce = Callable[[], tuple[torch.Tensor | None, ...]]


def placeholder(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return zeros of this shape without storage, for the edges of autograd's graph."""
    return _zero(like.dtype, like.device).expand(shape)


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # an inference tensor would fail in training
        return torch.zeros((), dtype=dtype, device=device)


class WaitForGrads(torch.autograd.Function):
    """Parameters to a placeholder per matrix; the backward waits for the parameters' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        finish_reduce: FinishReduce,
        likes: Sequence[torch.Tensor],
        *_: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.finish_reduce = finish_reduce
        return tuple(placeholder(like, ()) for like in likes)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *ctx.finish_reduce())


class WaitWithTokens(torch.autograd.Function):
    """Identity of tokens; the backward runs the wait nodes of `placeholders` in the tokens' graph.

    Megatron's combined schedule runs the backward of a layer's parts one by one, and this one last.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, *placeholders: torch.Tensor) -> torch.Tensor:
        ctx.placeholders = placeholders
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (grad, *(placeholder(part.detach(), ()) for part in ctx.placeholders))


class RunOnBackward(torch.autograd.Function):
    """Identity of tensors; the backward calls `call` once all their gradients have arrived.

    Unlike a hook, a node runs once per backward, in the same order on every rank, even without
    tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Callable[[], None], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call()
        return (None, *grads)


def run_on_backward(call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    marked = iter(RunOnBackward.apply(call, *(part for part in tensors if part.requires_grad)))
    return tuple(next(marked) if tensor.requires_grad else tensor for tensor in tensors)


class SlicesToSlots(torch.autograd.Function):
    """Placeholders of parameters to those of whole matrices; the backward has whole gradients.

    Args:
        on_grads: receives the gradients `[C, R, K]`.
        returns_grads: whether backward passes on placeholders, to a `WaitForGrads`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        on_grads: Callable[[tuple[torch.Tensor, ...]], None],
        shapes: Sequence[Shape],
        returns_grads: bool,
        *placeholders: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.on_grads, ctx.returns_grads = on_grads, returns_grads
        return tuple(
            placeholder(tensor, shape) for tensor, shape in zip(placeholders, shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.on_grads(grads)
        passed_on = (placeholder(grad, ()) if ctx.returns_grads else None for grad in grads)
        return (None, None, None, *passed_on)
