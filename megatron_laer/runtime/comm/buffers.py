"""Memory of exchanges: pools of their results, and workspaces to send from and receive into.

`planner.workspace` has the sizes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_laer.runtime.comm.streams import OneComputeStream

_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


class BufferPool:
    """Reused tensors, by shape and dtype.

    On CUDA a tensor may be put back while the caller's stream still uses it. Its next user submits
    work behind that stream (`streams.CommStream`), so all callers must share one, which is
    asserted.

    Attributes:
        in_use: number of tensors that were taken and not put back.
        num_bytes: size of all tensors ever made.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self.num_bytes = 0
        self._free: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
        self._compute = OneComputeStream("a buffer pool")

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        self._compute.check(device)
        self.in_use += 1
        free = self._free[shape, dtype, device]
        if free:
            return free.pop()
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def put_back(self, tensor: torch.Tensor) -> None:
        self._compute.check(tensor.device)
        self.in_use -= 1
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)


class Buffers:
    """Named byte buffers that only grow."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def buffer(self, name: str, num_bytes: int, device: torch.device) -> torch.Tensor:
        if name not in self._buffers or self._buffers[name].numel() < num_bytes:
            self._buffers.pop(name, None)  # free before the new allocation
            self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers[name]


class Workspace:
    """Buffers of exchanges on one CUDA stream.

    Exchanges that run side by side have some each. Others overwrite each other's data without
    waiting.
    """

    def __init__(self) -> None:
        self._lent: list[bool] = []
        self._buffers: list[Buffers] = []

    @property
    def num_bytes(self) -> int:
        return sum(buffers.num_bytes for buffers in self._buffers)

    @contextlib.contextmanager
    def lent(self) -> Iterator[Buffers]:
        """Lend an exchange the first buffers that no other has."""
        if all(self._lent):
            self._lent.append(False)
            self._buffers.append(Buffers())
        at = self._lent.index(False)
        self._lent[at] = True
        try:
            yield self._buffers[at]
        finally:
            self._lent[at] = False


@dataclass(frozen=True)
class MatrixBuffers:
    """Buffers of a workspace for rows of one matrix, to be allocated once.

    Attributes:
        columns: K.
        sizes: bytes of each buffer.
        grow: whether buffers are as large as the rows so far, without a bound.
    """

    buffers: Buffers
    columns: int
    sizes: Mapping[str, int]
    device: torch.device
    grow: bool = False

    def take(self, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first rows of a buffer, [rows, K]."""
        num_bytes, most_bytes = rows * self.columns * dtype.itemsize, self.sizes[name]
        assert self.grow or num_bytes <= most_bytes, (
            f"{name}: {num_bytes} bytes exceed the bound {most_bytes}"
        )
        wanted_bytes = num_bytes if self.grow else most_bytes
        buffer = self.buffers.buffer(name, wanted_bytes, self.device)
        return buffer[:num_bytes].view(dtype).view(rows, self.columns)
