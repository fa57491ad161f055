"""Memory of exchanges: pools of their results, and workspaces to send from and receive into.

`planner.workspace` has the sizes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

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


# Returns the first rows of a buffer, [rows, K], by its name, their number and dtype.
Take = Callable[[str, int, torch.dtype], torch.Tensor]


class Workspace:
    """Named buffers of exchanges on one CUDA stream, which only grow.

    Exchanges that run side by side have some each. Others overwrite each other's data without
    waiting.
    """

    def __init__(self) -> None:
        self._lent: set[int] = set()
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    @contextlib.contextmanager
    def lent(
        self, most_bytes: Mapping[str, int] | None, columns: int, device: torch.device
    ) -> Iterator[Take]:
        """Lend an exchange the first buffers that no other has.

        Args:
            most_bytes: of each buffer, which is allocated once; None to let them grow as needed.
            columns: K.
        """
        at = next(at for at in itertools.count() if at not in self._lent)

        def take(name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
            num_bytes = rows * columns * dtype.itemsize
            wanted = num_bytes if most_bytes is None else most_bytes[name]
            assert num_bytes <= wanted, f"{name}: {num_bytes} bytes exceed the bound {wanted}"
            key = at, name
            if key not in self._buffers or self._buffers[key].numel() < wanted:
                self._buffers.pop(key, None)  # free before the new allocation
                self._buffers[key] = torch.empty(wanted, dtype=torch.uint8, device=device)
            return self._buffers[key][:num_bytes].view(dtype).view(rows, columns)

        self._lent.add(at)
        try:
            yield take
        finally:
            self._lent.remove(at)
