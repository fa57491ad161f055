"""Planner states on a disk that takes none: the checkpoint stays whole, and one line says so."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_laer.runtime.planner_checkpoint import save_states, state_path

pytestmark = pytest.mark.unit


def coordinator(group_rank: int = 0) -> Any:
    """As much of one as saving looks at."""
    state = SimpleNamespace(to_bytes=lambda: b"state")
    return SimpleNamespace(
        groups=SimpleNamespace(rank=group_rank, index=0), planner_state=lambda: state
    )


class FullDisk:
    """Opens files that take half of what is written."""

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
        save_states(str(tmp_path), coordinator(), FullDisk())
    (record,) = caplog.records
    assert "not in the checkpoint" in record.getMessage()
    assert "No space left" in record.getMessage()
    assert not Path(state_path(str(tmp_path), 0)).exists(), "half a state is left behind"


def test_only_the_groups_first_rank_writes(tmp_path: Path) -> None:
    storage = SimpleNamespace(os=os, open=open)
    save_states(str(tmp_path), coordinator(group_rank=1), storage)
    assert not list(tmp_path.iterdir())
    save_states(str(tmp_path), coordinator(), storage)
    assert Path(state_path(str(tmp_path), 0)).read_bytes() == b"state"
