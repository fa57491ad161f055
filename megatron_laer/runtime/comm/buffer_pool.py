"""A `BufferPool` hands out tensors again and again, so that steady state allocates nothing.

How many there are follows from the schedule: as many as it has layers in flight.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from megatron_laer.runtime.comm.streams import OneComputeStream

_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


class BufferPool:
    """Hands out tensors by shape and dtype, and takes them back.

    On CUDA a tensor may be put back while the caller's stream still uses it: whoever takes it next
    submits its work behind that stream (see `streams.CommStream`). So all callers must share one
    stream, which is asserted.

    Attributes:
        in_use: how many tensors were taken and not put back.
        num_bytes: the size of all tensors ever made.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self.num_bytes = 0
        self._free: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
        self._compute = OneComputeStream("a buffer pool")

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Hand out an uninitialised tensor."""
        self._compute.check(device)
        self.in_use += 1
        free = self._free[shape, dtype, device]
        if free:
            return free.pop()
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def put_back(self, tensor: torch.Tensor) -> None:
        """Take back a tensor from `take` that nobody reads any more."""
        self._compute.check(tensor.device)
        self.in_use -= 1
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)
