"""Named ranges are shown by the device's profiler: NVTX on CUDA, for Nsight Systems.

Unlike `with` blocks, they may end in another thread than they began in: a phase of the forward pass
ends in autograd's thread. On the CPU there is no such profiler, and nothing is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

OpenRange = Callable[[str], Callable[[], None]]
"""Begins a range of this name, and returns what ends it."""


def make_ranges(device: torch.device) -> OpenRange:
    """Return the function that opens ranges of a device's profiler."""
    return _nvtx_range if device.type == "cuda" else _no_range


def _nvtx_range(name: str) -> Callable[[], None]:
    return functools.partial(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))


def _no_range(name: str) -> Callable[[], None]:
    return _nothing


def _nothing() -> None:
    return None
