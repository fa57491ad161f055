"""Autograd nodes between a layer's parameters and its restored experts.

The node before the experts (`run_on_backward`) receives the gradients of whole matrices. Their
reduce starts after the tokens' gradients have arrived at the dispatch's, since the backward pass
waits for those. The tokens' gradients go on to a node that waits for the reduce
(`RestoredExperts.make_wait`), and hands the parameters' gradients to Megatron:

- Autograd runs the newest node first. So one created early in forward, during the previous layer's
  compute, waits only after that layer's backward. If that layer is the same one, its pass adds to
  the same main gradients, so the node is created at the gate.
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

Gradients = tuple[torch.Tensor | None, ...]


def placeholder(like: torch.Tensor, shape: Sequence[int] = ()) -> torch.Tensor:
    """Return zeros of this shape without storage, for the edges of autograd's graph."""
    return _zero(like.dtype, like.device).expand(shape)


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # an inference tensor would fail in training
        return torch.zeros((), dtype=dtype, device=device)


def unused(like: torch.Tensor) -> torch.Tensor:
    """Return a leaf of autograd's graph whose gradient nothing reads."""
    return placeholder(like).requires_grad_()


def run_on_backward(
    call: Callable[..., None],
    *tensors: torch.Tensor,
    placeholders: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    """Return the tensors, and placeholders that need gradients.

    Backward calls `call` once all their gradients have arrived, with those of the placeholders.
    """
    marked = [tensor for tensor in tensors if tensor.requires_grad]
    number = len(marked)  # not the tensors, which would live as long as the node

    def make(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in (*given[:number], *placeholders))

    def back(*grads: torch.Tensor) -> Gradients:
        call(*grads[number:])
        return (*grads[:number], None) if len(grads) > number else grads

    made = iter(node(make, back, *marked, *(unused(like) for like in placeholders[:1])))
    return (*(next(made) if tensor.requires_grad else tensor for tensor in tensors), *made)


def node(make: Callable[..., Any], back: Callable[..., Gradients], *inputs: torch.Tensor) -> Any:
    """Return the outputs that `make` returns for the inputs; `back` returns their gradients.

    Unlike a hook, a node runs once per backward, after all gradients of its outputs, in the same
    order on every rank, even without tokens.
    """
    return _Node.apply(make, back, *inputs)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Any], back: Callable[..., Gradients], *inputs: torch.Tensor
    ) -> Any:
        ctx.back = back
        return make(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        return (None, None, *ctx.back(*grads))
