"""Faults of a reduce on one rank, as a wrong exchange, memory or order of streams would make them.

A training with them passes to the reduce other gradients than the slots', or takes its sums late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import rank_of_environment
from tests.faults.injected import current_step
from tests.parity.replay import train_row


def _lost(grads_CRK: torch.Tensor) -> None:
    grads_CRK[-1] = 0


def _doubled(grads_CRK: torch.Tensor) -> None:
    grads_CRK[-1] *= 2


def _scaled(grads_CRK: torch.Tensor) -> None:
    grads_CRK[-1] *= 1.25


def _rows_lost(grads_CRK: torch.Tensor) -> None:
    grads_CRK[-1, : grads_CRK.shape[1] // 4] = 0


def _rows_swapped(grads_CRK: torch.Tensor) -> None:
    grads_CRK[-1, :2] = grads_CRK[-1, :2].flip(0)


def _experts_swapped(grads_CRK: torch.Tensor) -> None:
    grads_CRK.copy_(grads_CRK.flip(0))


# Each by its name, of the gradients `[C, rows of an expert, K]` that a rank sends.
DAMAGES: dict[str, Callable[[torch.Tensor], None]] = {
    "a lost replica": _lost,
    "a doubled replica": _doubled,
    "another scale": _scaled,
    "lost rows": _rows_lost,
    "swapped rows": _rows_swapped,
    "swapped experts": _experts_swapped,
}


def train_with_damaged_gradients(
    flags: list[str], rank: int, step: int, damage: str, folder: str
) -> None:
    """Train in a folder; in a step, all that a rank's slots send is damaged on the way."""
    from megatron_laer.runtime.comm.exchange import Exchange

    reduce = Exchange.reduce_steps

    def damaged(self: Exchange, grads_CRK: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if current_step() == step and rank_of_environment() == rank:
            grads_CRK = grads_CRK.clone()
            DAMAGES[damage](grads_CRK)
        return (yield from reduce(self, grads_CRK, *args, **kwargs))

    with contextlib.chdir(folder), mock.patch.object(Exchange, "reduce_steps", damaged):
        train_row(flags)


def train_with_late_sums(flags: list[str], rank: int, step: int, folder: str) -> None:
    """Train in a folder; in a step, an owner has a reduce's sums with the next reduce only."""
    from megatron_laer.runtime.comm.exchange import Exchange

    reduce, late = Exchange.reduce_steps, list[tuple[torch.Tensor, torch.Tensor]]()

    def delayed(self: Exchange, *args: Any, add_to: Any, **kwargs: Any) -> Any:
        for owned, grown in late:
            owned.add_(grown)
        late.clear()
        if current_step() != step or rank_of_environment() != rank:
            return (yield from reduce(self, *args, add_to=add_to, **kwargs))
        there = [add_to[at] for at in range(len(add_to))]
        instead = [torch.zeros_like(owned) for owned in there]
        late.extend(zip(there, instead, strict=True))
        yield from reduce(self, *args, add_to=instead, **kwargs)
        return there[0]

    with contextlib.chdir(folder), mock.patch.object(Exchange, "reduce_steps", delayed):
        train_row(flags)
