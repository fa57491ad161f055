"""Memory of exchanges: pools of their results, and workspaces to send from and receive into.

`planner.workspace` has the sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from megatron_laer.runtime.comm.memory import POISONS, Memory, empty, lent_again, poison
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
            return lent_again(free.pop())
        tensor = empty(shape, dtype, device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def put_back(self, tensor: torch.Tensor) -> None:
        self._compute.check(tensor.device)
        self.in_use -= 1
        poison(tensor)
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)

    @contextmanager
    def lent(self) -> Iterator[Memory]:
        """Lend tensors to one exchange, the same ones to each that takes as many."""
        taken = list[torch.Tensor]()

        def take(*of: Any) -> torch.Tensor:
            taken.append(self.take(*of))
            return taken[-1]

        try:
            yield take
        finally:
            while taken:
                self.put_back(taken.pop())


class Buffer:
    """Memory of one holding at a time, from its first row until its last one has left.

    Exchanges follow each other on one CUDA stream, and so overwrite each other's rows without
    waiting.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bytes: torch.Tensor | None = None
        self._is_taken = False

    @property
    def num_bytes(self) -> int:
        return 0 if self._bytes is None else self._bytes.numel()

    def reserve(self, num_bytes: int, device: torch.device) -> None:
        """Grow to the bytes that an exchange needs, before it begins."""
        assert not self._is_taken, f"{self._name}: rows of another exchange are in the buffer"
        # Rows may lie by luck where there is more room; on a card that shows their races.
        is_exact = POISONS and device.type == "cpu"
        if self._bytes is None or self.num_bytes < num_bytes or is_exact:
            if self._bytes is not None:
                poison(self._bytes)
            self._bytes = None  # free before the new allocation
            self._bytes = empty((num_bytes,), torch.uint8, device)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first rows, which are the caller's until `give_back`, if there are any."""
        assert self._bytes is not None
        if not rows:
            return self._bytes[:0].view(dtype).view(0, columns)
        assert not self._is_taken, f"{self._name}: rows that have not left would be overwritten"
        num_bytes = rows * columns * dtype.itemsize
        assert num_bytes <= self.num_bytes, (
            f"{self._name}: {num_bytes} bytes exceed the {self.num_bytes} that were reserved"
        )
        self._is_taken = True
        return poison(self._bytes)[:num_bytes].view(dtype).view(rows, columns)

    def give_back(self) -> None:
        """End the use of the rows, if there is any, behind work of the current stream."""
        if self._is_taken and self._bytes is not None:
            poison(self._bytes)
        self._is_taken = False


@dataclass(frozen=True)
class Workspace:
    """Buffers from which exchanges of one direction send, and into which they receive."""

    send: Buffer = field(default_factory=lambda: Buffer("send"))
    receive: Buffer = field(default_factory=lambda: Buffer("receive"))

    @property
    def num_bytes(self) -> int:
        return self.send.num_bytes + self.receive.num_bytes

    @contextmanager
    def lent(self, most_bytes: Mapping[str, int], device: torch.device) -> Iterator[Self]:
        """Lend the buffers to one exchange, with all bytes that it needs."""
        self.send.reserve(most_bytes["send"], device)
        self.receive.reserve(most_bytes["receive"], device)
        try:
            yield self
        finally:
            self.send.give_back()
            self.receive.give_back()
