"""CPU fixes of Megatron-FSDP, which numbers devices and has NCCL scale sums; after `cuda.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def fix() -> None:
    """Make Megatron-FSDP shard on gloo ranks. Imports its package."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
    from megatron.core.optimizer import distrib_optimizer

    adapter: Any = mcore_fsdp_adapter
    adapter.FullyShardedDataParallel.__init__ = _with_index(
        adapter.FullyShardedDataParallel.__init__
    )
    optimizer: Any = distrib_optimizer.DistributedOptimizer
    for name, first in _OF_STATES.items():
        setattr(optimizer, name, _with_empty_states(getattr(optimizer, name), first=first))
    buffers: Any = param_and_grad_buffer
    buffers.gradient_reduce_preprocessing = _without_nccl(buffers.gradient_reduce_preprocessing)


# Methods of the optimizer that save or load its states, and whether these are complete by then.
_OF_STATES = {
    "sharded_param_state_fsdp_dtensor": True,
    "_init_optimizer_states_with_dummy_values": False,
}


def _with_index(original: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that sees the number of the current device, and makes a name of it."""

    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:
        device: Any = torch.cuda.current_device()
        index = device if isinstance(device, int) else 0  # the labelled device of tests has one
        with mock.patch.object(torch.cuda, "current_device", lambda: index):
            original(*args, **kwargs)

    return __init__


def _with_empty_states(original: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
    """Add states of torch's Adam for parameters of which this rank has no row, before or after.

    Each rank of a group takes part in saving every state, and those without a row have no gradient.
    """

    def fill(optimizer: Any) -> None:
        state = optimizer.state
        steps = [known["step"] for known in state.values() if "step" in known]
        parts = [part for group in optimizer.param_groups for part in group["params"]]
        for part in parts if steps else ():
            known = state.pop(part, {})  # and put it back, in one order on all ranks
            if not known:
                known = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
                known["step"] = steps[0].clone()
            state[part] = known

    @functools.wraps(original)
    def filled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if first:
            fill(self.optimizer)
        result = original(self, *args, **kwargs)
        fill(self.optimizer)
        return result

    return filled


def _without_nccl(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scale gradients before their sum: only NCCL has a sum that scales."""

    @functools.wraps(original)
    def gradient_reduce_preprocessing(grad: Any, scale: Any, ddp_config: Any) -> Any:
        unfused = dataclasses.replace(ddp_config, gradient_reduce_div_fusion=False)
        return original(grad, scale, unfused)

    return gradient_reduce_preprocessing
