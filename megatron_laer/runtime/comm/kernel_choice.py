"""Triton's kernels run on CUDA, and torch does the same work elsewhere: that is decided here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


@cache
def kernels_of(package: str, device: torch.device) -> Any:
    """Return the package's module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"{package}.kernels")
