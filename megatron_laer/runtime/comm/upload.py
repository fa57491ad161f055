"""Copies from the host to the device are made here, and the host never waits for them.

They run on the current stream. Another stream that reads what was copied must come after it, and
must tell the allocator (`read_here`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Copy arrays to the device at once, as `upload` does; they share one piece of memory."""
    packed = upload(torch.from_numpy(np.concatenate(arrays)), device)
    return list(packed.split([len(array) for array in arrays]))


def read_here(tensor: torch.Tensor) -> None:
    """Tell CUDA's allocator that the current stream reads this tensor, made on another stream.

    When the host lets go of the tensor, this stream may still have kernels in its queue that read
    it: its memory is another's only after these. One call covers all that share the memory.
    """
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
