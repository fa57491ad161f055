"""Copies from the host to the device are made here without waiting for the compute queued there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from megatron_laer.arrays import Int64


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device on the current stream, without waiting for that stream.

    A copy from memory that is not pinned would wait.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_arrays(arrays: Sequence[Int64], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to the device at once, for use on any stream.

    On CUDA the copy runs on a stream of its own, which is waited for: so the tensors may be used on
    any stream at once, and the wait is never behind queued compute. They are for index tensors that
    a cache holds: these outlive any kernel that reads them, because many newer layouts must come
    before the cache lets go of them.
    """
    packed = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        with torch.cuda.stream(_upload_stream(device)):
            packed = packed.to(device)
    return list(packed.split([len(array) for array in arrays]))


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
