"""Trainings whose layers go to stock's placement under way, and stock's with the same steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_laer.cpu.training import rank_of_environment
from tests.faults.injected import current_step
from tests.faults.wrong_weights import train_with_damaged_slots
from tests.parity.replay import train_row
from tests.probes import running


@contextlib.contextmanager
def _skipped_steps_have_a_norm() -> Iterator[None]:
    """Give the record of a training a norm in steps that Megatron skips, where it has None."""
    from megatron.training import training

    train_step = training.train_step

    def with_norm(*args: Any, **kwargs: Any) -> Any:
        result = list(train_step(*args, **kwargs))
        result[5] = float("nan") if result[5] is None else result[5]
        return tuple(result)

    with mock.patch.object(training, "train_step", with_norm):
        yield


def train_on_after_damage(
    flags: list[str], rank: int, step: int, damage: str, folder: str
) -> list[float]:
    """Train with `verify=…,warn` and damaged slots in a step; return the losses."""
    with _skipped_steps_have_a_norm():
        return train_with_damaged_slots(flags, rank, step, damage, folder)


def train_without_step(flags: list[str], step: int) -> list[float]:
    """Train; leave the optimizer's step out once, as for a loss that overflows."""
    from megatron.training import training

    train_step = training.train_step

    def left_out(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[3]
        if current_step() != step:
            return train_step(*args, **kwargs)
        with mock.patch.object(optimizer, "step", lambda: (False, None, None)):
            return train_step(*args, **kwargs)

    with (
        mock.patch.object(training, "train_step", left_out),
        _skipped_steps_have_a_norm(),
    ):
        return train_row(flags).losses


def train_and_switch(
    flags: list[str], file: str, changes: Sequence[int]
) -> tuple[list[float], list[bool], list[int]]:
    """Train; at the end of these steps rank 0 makes the file, or removes it.

    Returns:
        Losses, and for each step whether all layers had stock's placement, and the restores.
    """
    from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner

    layouts, at_stock, restores = list[Any](), list[bool](), list[int]()
    note = MicrobatchPlanner._note

    def noted(self: MicrobatchPlanner, *args: Any) -> None:
        layouts.append(args[2].layout)
        note(self, *args)

    def look(_model: object) -> None:
        count, static = running().streams.exchange.count, running().layouts.geometry.static_layout
        at_stock.append(all(layout == static for layout in layouts))
        restores.append(count.restores - sum(restores))
        layouts.clear()
        if current_step() in changes and rank_of_environment() == 0:
            path = Path(file)
            path.unlink() if path.exists() else path.touch()

    with mock.patch.object(MicrobatchPlanner, "_note", noted):
        return train_row(flags, look).losses, at_stock, restores
