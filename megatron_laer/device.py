"""Device that Megatron runs on, and the only access to the CPU's replacements.

Megatron calls `torch.cuda` unconditionally. Without a usable GPU, or on request, `install_cpu`
loads `megatron_laer.cpu`, whose functions keep everything on the CPU. With a GPU nothing of that
part is imported.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_laer.environment import DEVICE

if TYPE_CHECKING:  # imported by no command that needs none
    import torch

CPU_FLAGS: tuple[str, ...] = (
    "--distributed-backend",
    "gloo",
    # The fused and Transformer Engine kernels exist for CUDA only.
    "--transformer-impl",
    "local",
    "--attention-backend",
    "unfused",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)
"""Megatron's flags that a run without a GPU needs, ready to be put on a command line."""

_DEVICES = ("auto", "cpu", "cuda")

_installed = False


def cpu_needed(force: bool = False) -> bool:
    """Return whether Megatron has to run on the CPU: by request, or without a usable CUDA device.

    `force` and `MEGATRON_LAER_DEVICE=cpu` request it. `MEGATRON_LAER_DEVICE=cuda` rules it out, so
    that a broken driver shows as Megatron's own error. Imports torch only if neither decides.
    """
    asked = os.environ.get(DEVICE, "auto")
    if asked not in _DEVICES:
        raise ValueError(
            f"{DEVICE}={asked!r} names no device; use one of {', '.join(_DEVICES)}, or unset it"
        )
    if _installed or force or asked == "cpu":
        return True
    if asked == "cuda":
        return False

    import torch

    return not torch.cuda.is_available()


def install_cpu() -> None:
    """Replace CUDA's functions by the CPU's for the process, before any import of Megatron."""
    global _installed
    if not _installed:
        _cpu_part().install()
        _installed = True


def install_cpu_in_helper() -> None:
    """Replace `torch.cuda` if needed, and nothing in Megatron, in a process that a rank spawned.

    It has imported the main script again, and Megatron perhaps too, whose names are then bound.
    """
    if not _installed and cpu_needed():
        _cpu_part().install_in_helper()


def cpu_installed() -> bool:
    return _installed


@cache
def kernels_of(package: str, device: torch.device) -> Any:
    """Return the package's module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return importlib.import_module(f"{package}.kernels")


def _cpu_part() -> Any:
    # Imported by name, so that training has no static import of that part.
    return importlib.import_module("megatron_laer.cpu.install")
