"""Memory that its user must write first. Tests fill it with impossible numbers.

With `MEGATRON_LAER_POISON=1` all bytes of such memory are 255: NaN in each float dtype, and -1 or
the highest number in integers. So rows that are stale or missing show in results.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_laer.environment import POISON

# Returns memory of a shape and a dtype on a device.
Memory = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]

POISONS = os.environ.get(POISON) == "1"
_BYTE = 255


def poison(memory: torch.Tensor) -> torch.Tensor:
    """Fill contiguous memory with impossible numbers, on the current stream, in tests alone."""
    if POISONS and memory.numel():
        with torch.no_grad(), _disable_current_modes():  # no launch for tests that count them
            memory.detach().view(-1).view(torch.uint8).fill_(_BYTE)
    return memory


def lent_again(memory: torch.Tensor) -> torch.Tensor:
    """Return poisoned memory; an assertion that nothing wrote to it since, in tests alone."""
    if POISONS and memory.numel():
        with torch.no_grad(), _disable_current_modes():
            of_bytes = memory.detach().view(-1).view(torch.uint8)
            assert bool((of_bytes == _BYTE).all()), "memory was written after it was put back"
    return memory


@torch.inference_mode(False)  # training could not write memory of an evaluation in that mode
def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialised memory."""
    return poison(torch.empty(shape, dtype=dtype, device=device))
