"""CPU fixes of Megatron-FSDP, which names CUDA devices and NCCL's fused sums; after `cuda.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def fix() -> None:
    """Let Megatron-FSDP shard on gloo ranks. Imports its package."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer

    adapter: Any = mcore_fsdp_adapter
    adapter.FullyShardedDataParallel.__init__ = _with_index(
        adapter.FullyShardedDataParallel.__init__
    )
    if hasattr(adapter, "DeviceMesh"):
        adapter.DeviceMesh = _CPUMesh
    buffers: Any = param_and_grad_buffer
    buffers.gradient_reduce_preprocessing = _without_nccl(buffers.gradient_reduce_preprocessing)


class _CPUMesh:
    """Constructor of device meshes of the CPU, whose groups are gloo's."""

    @staticmethod
    def from_group(*args: Any, device_type: str, **kwargs: Any) -> Any:
        from torch.distributed import DeviceMesh

        return DeviceMesh.from_group(*args, device_type="cpu", **kwargs)


def _with_index(original: Callable[..., None]) -> Callable[..., None]:
    """Give a constructor, which formats the current device into a name, its number."""

    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "current_device", lambda: 0):
            original(*args, **kwargs)

    return __init__


def _without_nccl(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scale gradients before their sum: only NCCL has a sum that scales."""

    @functools.wraps(original)
    def gradient_reduce_preprocessing(grad: Any, scale: Any, ddp_config: Any) -> Any:
        unfused = dataclasses.replace(ddp_config, gradient_reduce_div_fusion=False)
        return original(grad, scale, unfused)

    return gradient_reduce_preprocessing
