"""Memory of exchanges: pools of their results, and workspaces to send from and receive into.

`planner.workspace` has the sizes.
"""

from __future__ import annotations

from collections import defaultdict

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
        tensor = _new(shape, dtype, device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def put_back(self, tensor: torch.Tensor) -> None:
        self._compute.check(tensor.device)
        self.in_use -= 1
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)


class Workspace:
    """Named buffers of exchanges on one CUDA stream, which only grow.

    Exchanges that follow each other overwrite each other's data without waiting.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        most_bytes: int | None,
    ) -> torch.Tensor:
        """Return the first rows of a buffer.

        Args:
            most_bytes: for which it is allocated once; None to let it grow as needed.
        """
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        wanted = num_bytes if most_bytes is None else most_bytes
        assert num_bytes <= wanted, f"{name}: {num_bytes} bytes exceed the bound {wanted}"
        if name not in self._buffers or self._buffers[name].numel() < wanted:
            self._buffers.pop(name, None)  # free before the new allocation
            self._buffers[name] = _new((wanted,), torch.uint8, device)
        return self._buffers[name].narrow(0, 0, num_bytes).view(dtype).view(shape)


@torch.inference_mode(False)  # training could not write memory of an evaluation in that mode
def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
