"""Autograd nodes tell a listener when a token exchange begins and ends, in both directions.

Identity nodes before and after the exchange; only a rank that writes a timeline, or records
metrics, has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_laer.telemetry.step_times import IntervalListener
from megatron_laer.telemetry.trace_events import Activity

Edge = Callable[..., tuple[torch.Tensor, ...]]


def exchange_edges(
    listener: IntervalListener, exchange: Activity, then: Activity, then_backward: Activity
) -> tuple[Edge, Edge]:
    """Make two functions: one to pass an exchange's inputs through, one for its outputs.

    Args:
        then, then_backward: the phase of the compute that follows, in either direction.
    """
    begin, end = listener.begin_exchange, listener.end_exchange
    before = partial(_Edge.apply, partial(begin, exchange), partial(end, then_backward))
    after = partial(
        _Edge.apply, partial(end, then), partial(begin, replace(exchange, backward=True))
    )
    return before, after


class _Edge(torch.autograd.Function):
    """Returns tensors as they are; calls one function in forward and another in backward."""

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
