"""Planner states on a full disk, and the log of a resumed run about its groups' states."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.planner_checkpoint import (
    Resumption,
    report_resumption,
    save_state,
    state_path,
)


def save(directory: Path, storage: Any, group_rank: int = 0) -> None:
    groups: Any = SimpleNamespace(rank=group_rank, index=0)
    state: Any = SimpleNamespace(to_bytes=lambda: b"state")
    save_state(str(directory), groups, lambda: state, storage)


class FullDisk:
    os = os

    def open(self, path: str, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115 -- the caller closes it
        write = file.write

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()


def test_a_state_that_cannot_be_written_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        save(tmp_path, FullDisk())
    (record,) = caplog.records
    assert "not in the checkpoint" in record.getMessage()
    assert "No space left" in record.getMessage()
    assert not Path(state_path(str(tmp_path), 0)).exists(), "half a state is left behind"


def test_only_the_groups_first_rank_writes(tmp_path: Path) -> None:
    storage = SimpleNamespace(os=os, open=open)
    save(tmp_path, storage, group_rank=1)
    assert not list(tmp_path.iterdir())
    save(tmp_path, storage)
    assert Path(state_path(str(tmp_path), 0)).read_bytes() == b"state"


def said(caplog: pytest.LogCaptureFixture, first_step: int, *groups: int | str | None) -> list[str]:
    """Return the log of a world with one rank per group, given a state's version or problem.

    The ranks load in turn. Rank 0 is the last, so it receives all answers.
    """
    shares: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        shares.append(mine)
        everyone[:] = shares + [(None, None)] * (len(groups) - len(shares))

    world = SimpleNamespace(
        get_world_size=lambda: len(groups),
        get_rank=lambda: len(groups) - len(shares),
        all_gather_object=gather,
    )
    with (
        mock.patch.object(planner_checkpoint, "dist", world),
        caplog.at_level(logging.INFO),
    ):
        for found in groups:
            state: Any = SimpleNamespace(version=found) if isinstance(found, int) else None
            problem = found if isinstance(found, str) else None
            report_resumption(Resumption(state, problem), first_step)
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_run_that_was_resumed_says_once_for_all_groups_what_it_goes_on_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert said(caplog, 0, None, None) == []
    (line,) = said(caplog, 30, 7)
    assert line.endswith("is restored: training goes on with step 30, layout version 7")
    (line,) = said(caplog, 30, 7, 5, 7)
    assert line.endswith("layout version 5 to 7, 3 groups")
    (line,) = said(caplog, 30, 7, "group-1.bin is cut off")
    assert line.endswith("static layout in 1 of 2 groups: group-1.bin is cut off")
    # Loaded without calling the plugin, like Megatron's local checkpoints.
    (line,) = said(caplog, 30, None)
    assert "planning starts anew, from the static layout: what the run is resumed from" in line
