"""Where a token exchange begins and ends, forward and backward, for the timeline.

Identity nodes before and after the exchange; only a run that writes a timeline has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_laer.telemetry.timeline import Timeline

Edge = Callable[..., tuple[torch.Tensor, ...]]


def exchange_edges(
    timeline: Timeline, name: str, then: str, then_backward: str
) -> tuple[Edge, Edge]:
    """What to pass an exchange's inputs through, and its outputs.

    Args:
        name: of the exchange.
        then, then_backward: the phase of the compute that follows it, in either direction.
    """
    begin, end = timeline.begin_exchange, timeline.end_exchange
    before = partial(_Edge.apply, partial(begin, name), partial(end, then_backward))
    after = partial(_Edge.apply, partial(end, then), partial(begin, f"{name}, backward"))
    return before, after


class _Edge(torch.autograd.Function):
    """Identity that calls something in forward and something in backward."""

    @staticmethod
    def forward(
        ctx: Any, pass_: Callable[[], None], back: Callable[[], None], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pass_()
        ctx.back = back
        ctx.set_materialize_grads(False)  # an exchange of nothing must stay one
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.back()
        return (None, None, *grads)
