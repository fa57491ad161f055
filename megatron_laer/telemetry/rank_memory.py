"""Memory of a rank, read without waiting for its device."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from megatron_laer.files.memory import available_bytes


@dataclass(frozen=True)
class MemoryUse:
    """Memory that a rank has used, and the rest.

    `used_bytes` is the peak of torch's reserved memory; on the CPU, resident memory.
    `headroom_bytes` is the device's memory beyond that peak; on the CPU, the machine's free memory.
    """

    used_bytes: int
    headroom_bytes: int


def memory_use(device: torch.device) -> MemoryUse:
    if device.type == "cuda":
        used_bytes = torch.cuda.max_memory_reserved(device)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        return MemoryUse(used_bytes, max(0, total_bytes - used_bytes))
    return MemoryUse(int(psutil.Process().memory_info().rss), available_bytes())
