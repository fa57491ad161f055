"""Faults of restored experts on one rank, as a wrong exchange or memory would make them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import rank_of_environment
from tests.faults.injected import current_step
from tests.parity.replay import train_row
from tests.probes import running


def _one_bit(slots_CRK: torch.Tensor) -> None:
    slots_CRK.view(torch.uint8).view(-1)[-1] ^= 1


def _row_lost(slots_CRK: torch.Tensor) -> None:
    slots_CRK[-1, 1] = 0


def _rows_swapped(slots_CRK: torch.Tensor) -> None:
    slots_CRK[-1, :2] = slots_CRK[-1, :2].flip(0)


def _experts_swapped(slots_CRK: torch.Tensor) -> None:
    slots_CRK.copy_(slots_CRK.flip(0))


def _scaled(slots_CRK: torch.Tensor) -> None:
    if slots_CRK.is_floating_point():
        slots_CRK[-1] *= 1.0625
    else:
        slots_CRK[-1] += 8  # a higher exponent in e4m3


# Each by its name, of slots `[C, rows of an expert, K]` that a restore has filled.
DAMAGES: dict[str, Callable[[torch.Tensor], None]] = {
    "one bit": _one_bit,
    "a lost row": _row_lost,
    "swapped rows": _rows_swapped,
    "swapped experts": _experts_swapped,
    "another scale": _scaled,
}


EVERY = -1  # step


def train_with_damaged_slots(
    flags: list[str], rank: int, step: int, damage: str, folder: str
) -> list[float]:
    """Train in a folder; in a step, all slots that a rank restores are damaged on arrival.

    Returns:
        The losses.
    """
    from megatron_laer.runtime.comm.exchange import Exchange

    restore = Exchange.restore_steps

    def damaged(self: Exchange, *args: Any, **kwargs: Any) -> Any:
        out = yield from restore(self, *args, **kwargs)
        if step in (current_step(), EVERY) and rank_of_environment() == rank:
            DAMAGES[damage](out)
        return out

    with contextlib.chdir(folder), mock.patch.object(Exchange, "restore_steps", damaged):
        return train_row(flags).losses


def train_with_stale_slots(flags: list[str], rank: int, step: int, folder: str) -> None:
    """Train in a folder; in a step, a rank's slots have experts of the step before."""
    from megatron_laer.runtime.comm.exchange import Exchange

    restore, kept = Exchange.restore_steps, dict[Any, torch.Tensor]()

    def stale(self: Exchange, owned: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        out = yield from restore(self, owned, index, *args, **kwargs)
        if rank_of_environment() == rank:
            before = kept.get(tuple(out.shape))
            if current_step() < step:
                kept[tuple(out.shape)] = out.clone()
            elif current_step() == step and before is not None:
                out.copy_(before)
        return out

    with contextlib.chdir(folder), mock.patch.object(Exchange, "restore_steps", stale):
        train_row(flags)


def train_and_count_checks(flags: list[str]) -> tuple[list[float], int, int, int]:
    """Train; return losses, the restores and reduces that were started, and the checks."""
    found = [0, 0, 0]

    def look(_model: object) -> None:
        coordinator = running()
        count = coordinator.streams.exchange.count
        found[:] = count.restores, count.reduces, coordinator.verifier.checks

    record = train_row(flags, look)
    restores, reduces, checks = found
    return record.losses, restores, reduces, checks
