"""Memory that a tensor claims to be in: a label on its storage, which all its views share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

PINNED = "pinned"
# Made in C++ with the options of a tensor, which on a card are the card's. Its use tells.
UNKNOWN = "unknown"

# A card, or one of these words; None is pageable memory of the host.
Memory = torch.device | str | None

_untyped_storage = torch._C.TensorBase.untyped_storage
_is_suspended = False


def card() -> torch.device:
    """Return this rank's card."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def label(tensor: torch.Tensor) -> Memory:
    if _is_suspended:
        return None
    try:
        storage: Any = _untyped_storage(tensor)
    except (RuntimeError, NotImplementedError):  # a fake tensor, or a table of others
        return None
    found: Memory = getattr(storage, "claimed_memory", None)
    return found


def put(tensor: torch.Tensor, memory: Memory) -> torch.Tensor:
    storage: Any = _untyped_storage(tensor)
    storage.claimed_memory = memory
    return tensor


def is_card(memory: Memory) -> bool:
    return isinstance(memory, torch.device)


def on_card(tensor: torch.Tensor) -> bool:
    return is_card(label(tensor))


def may_be_on_card(tensor: torch.Tensor) -> bool:
    memory = label(tensor)
    return memory == UNKNOWN or is_card(memory)


def torchs_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind that of the CPU platform, if it is one."""
    own: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return own


def is_suspended() -> bool:
    return _is_suspended


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Let tensors be the CPU's inside the block, for code that stays below the device."""
    global _is_suspended
    before, _is_suspended = _is_suspended, True
    try:
        yield
    finally:
        _is_suspended = before
