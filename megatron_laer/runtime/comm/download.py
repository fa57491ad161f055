"""Copies from the device to the host are made here; the host waits for one only where it reads it.

The other way is `upload`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_laer.runtime.comm.streams import exchange_stream, has_streams


class Download:
    """Copies tensors of one shape to the host, on a stream of its own beside the compute.

    They go to the same pinned memory, so each is read before the next copy starts.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = exchange_stream(device) if has_streams(device) else None
        self._pinned: torch.Tensor | None = None
        # Of the copy that was not read yet; the tensor must live as long.
        self._latest: tuple[torch.cuda.Event, torch.Tensor] | None = None

    def start(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Enqueue a copy behind what the current stream holds so far; the host does not wait.

        Returns:
            A function that waits until the copy is there, and returns what was copied.
        """
        if self._stream is None:
            return lambda: tensor
        if self._pinned is None:
            self._pinned = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._pinned.copy_(tensor, non_blocking=True)
            done = self._stream.record_event()
        self._latest = done, tensor
        return partial(self._read, done, self._pinned)

    def _read(self, done: torch.cuda.Event, pinned: torch.Tensor) -> torch.Tensor:
        assert self._latest is not None and self._latest[0] is done, (
            "a copy is read twice, or after another one was started, which overwrites it"
        )
        done.synchronize()
        self._latest = None
        return pinned.clone()
