"""Copies between host and device. The host waits only where it reads a download.

Uploads run on the current stream. Downloads run on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.runtime.comm.memory import poison
from megatron_laer.runtime.comm.streams import exchange_stream, has_streams


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor on the current stream; only pinned memory avoids waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.inference_mode(False)  # training may use what an evaluation in that mode has uploaded
def upload_arrays(arrays: Sequence[Int64], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to the device at once, as `upload` does, into shared memory."""
    packed = upload(torch.from_numpy(np.concatenate(arrays)), device)
    return list(packed.split([len(array) for array in arrays]))


class Upload:
    """Uploads of one size, from a pinned buffer that the host writes again.

    Each must follow a wait of the host for work that was enqueued behind the one before. A layer's
    gate is such a wait.
    """

    def __init__(self) -> None:
        self._pinned: torch.Tensor | None = None

    def start(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy a host tensor on the current stream, as `upload` does."""
        if device.type != "cuda":
            return tensor
        if self._pinned is None:
            self._pinned = _pinned_like(tensor)
        return self._pinned.copy_(tensor).to(device, non_blocking=True)


class Download:
    """Copies to one pinned buffer on a separate stream, each read before the next starts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = exchange_stream(device) if has_streams(device) else None
        self._pinned: torch.Tensor | None = None
        # Event and tensor of the pending copy; the tensor must live as long.
        self._latest: tuple[torch.cuda.Event, torch.Tensor] | None = None

    def start(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Enqueue a copy behind the current stream's work; return a function that waits for it.

        The copy that it returns lasts until the next one is started.
        """
        if self._stream is None:
            return lambda: tensor
        if self._pinned is None:
            self._pinned = _pinned_like(tensor)
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
        return pinned


@torch.inference_mode(False)
def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return poison(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True))
