"""A `Workspace` holds the memory that exchanges send from and receive into.

How much each buffer needs is computed in `workspace_sizes.py`. Results are not in here: they live
as long as their users want.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


class Workspace:
    """Holds named byte buffers that only ever grow, on the device of their first use.

    One exchange at a time may use it, and on CUDA always on the same stream: what one exchange left
    in a buffer is overwritten by the next without waiting.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Count the bytes that all buffers hold together."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def buffer(self, name: str, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return the buffer `name`, of at least so many bytes."""
        if name not in self._buffers or self._buffers[name].numel() < num_bytes:
            self._buffers.pop(name, None)  # before its successor is allocated
            self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers[name]


@dataclass(frozen=True)
class MatrixBuffers:
    """Lends the buffers of a workspace, for exchanges of one size of matrix.

    Attributes:
        sizes: bytes that each buffer will ever need for matrices of this size, so that it is
            allocated once and not again for the next layout.
    """

    workspace: Workspace
    sizes: Mapping[str, int]
    device: torch.device

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Lay an uninitialised contiguous tensor on buffer `name`."""
        num_bytes, most_bytes = math.prod(shape) * dtype.itemsize, self.sizes[name]
        assert num_bytes <= most_bytes, f"{name}: {num_bytes} bytes exceed the bound {most_bytes}"
        buffer = self.workspace.buffer(name, most_bytes, self.device)
        return buffer[:num_bytes].view(dtype).view(shape)
