"""A rank's memory is read here, without waiting for its device."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from megatron_laer.files.memory import available_bytes


@dataclass(frozen=True)
class MemoryUse:
    """Memory that a rank has taken, and the rest.

    Attributes:
        used_bytes: of a device the peak of what torch reserved, of the CPU what is resident.
        headroom_bytes: of a device what is beyond that peak, which other libraries share; of the
            CPU what is free now, which the machine's ranks share.
    """

    used_bytes: int
    headroom_bytes: int


def memory_use(device: torch.device) -> MemoryUse:
    """Return what this process has taken of the device's memory, or of the machine's."""
    if device.type == "cuda":
        used_bytes = torch.cuda.max_memory_reserved(device)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        return MemoryUse(used_bytes, max(0, total_bytes - used_bytes))
    return MemoryUse(int(psutil.Process().memory_info().rss), available_bytes())
