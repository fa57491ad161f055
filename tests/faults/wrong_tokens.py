"""Faults of a token exchange on one rank, as wrong memory or stale indices would make them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import rank_of_environment
from tests.faults.injected import current_step
from tests.parity.replay import train_row


def _largest(rows_RH: torch.Tensor) -> int:
    """Return a row far outside roundings of the others; those of a small one may hide it."""
    return int(rows_RH.float().norm(dim=1).argmax())


def _lost(rows_RH: torch.Tensor) -> None:
    rows_RH[_largest(rows_RH)] = 0


def _doubled(rows_RH: torch.Tensor) -> None:
    largest = _largest(rows_RH)
    rows_RH[largest] = rows_RH[largest - len(rows_RH) // 2]


def _stale(rows_RH: torch.Tensor) -> None:
    rows_RH.copy_(rows_RH.roll(1, 0))


def _swapped(rows_RH: torch.Tensor) -> None:
    rows_RH[[0, -1]] = rows_RH[[-1, 0]]


def _one_bit(rows_RH: torch.Tensor) -> None:
    rows_RH[0].view(torch.int32 if rows_RH.element_size() == 4 else torch.int16)[0] ^= 1


def _scaled(rows_RH: torch.Tensor) -> None:
    rows_RH *= 1.25


# Each by its name, of rows `[R, H]` that an exchange has brought to a rank.
DAMAGES: dict[str, Callable[[torch.Tensor], None]] = {
    "a lost token": _lost,
    "a doubled token": _doubled,
    "a stale index": _stale,
    "tokens of other experts": _swapped,
    "another scale": _scaled,
    "one bit": _one_bit,
}


def train_with_damaged_tokens(
    flags: list[str], rank: int, step: int, damage: str, exchange: str, folder: str
) -> None:
    """Train in a folder; in a step, an exchange brings damaged rows to a rank.

    Args:
        exchange: `token_dispatch` or `token_combine`; `probs` for the former's probabilities.
    """
    from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching

    of_probs = exchange == "probs"
    method = "token_dispatch" if of_probs else exchange
    run = getattr(SlotDispatching, method)

    def damaged(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = run(self, *args, **kwargs)
        if current_step() != step or rank_of_environment() != rank:
            return found
        tensors = list(found) if isinstance(found, tuple) else [found]
        tensors[of_probs] = tensors[of_probs].clone()
        with torch.no_grad():
            DAMAGES[damage](tensors[of_probs])
        return tuple(tensors) if isinstance(found, tuple) else tensors[0]

    with contextlib.chdir(folder), mock.patch.object(SlotDispatching, method, damaged):
        train_row(flags)
