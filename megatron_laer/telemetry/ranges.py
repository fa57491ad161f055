"""Ranges of activities in torch's profiler, as Megatron's `--profile` shows them.

With `--use-pytorch-profiler` they are in the trace. Else Megatron enters `emit_nvtx`, by which they
are NVTX ranges in Nsight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import profiler

from megatron_laer.telemetry.activities import Activity

_NO_RANGE = contextlib.nullcontext()


def named_range(activity: Activity) -> contextlib.AbstractContextManager[Any]:
    """Return a range for this thread's profiler, or without one a context that does nothing."""
    # Without a profiler, torch's range takes microseconds as well.
    return profiler.record_function(str(activity)) if _is_profiled() else _NO_RANGE


def exchange_in_range(
    activity: Activity,
    exchange: Callable[..., tuple[torch.Tensor, ...]],
    tensors: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Exchange tensors in a range, as the first result's node will do in backward."""
    with named_range(activity):
        received = exchange(*tensors)
    node = received[0].grad_fn
    if node is not None and _is_profiled():
        backward = named_range(replace(activity, backward=True))

        def enter(*_: Any) -> None:  # a returned value would replace gradients
            backward.__enter__()

        def leave(*_: Any) -> None:
            backward.__exit__(None, None, None)

        node.register_prehook(enter)
        node.register_hook(leave)
    return received


def _is_profiled() -> bool:
    return profiler._is_profiler_enabled
