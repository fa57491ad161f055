"""In training, this rank's part of an exchange is found ahead of it, where nothing waits."""

from __future__ import annotations

import sys
import threading
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.parity.flags import command_line
from tests.parity.replay import train_row
from tests.parity.row import HOMES

# Functions that may build an index, found on the stack in this order.
PLACES = ("begin_step", "prepare_backward", "change", "start_restore", "start_reduce")
RECOMPUTE = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def places_of_builds(command: list[str]) -> set[str]:
    """Train; return the place in the host's program, or the thread, where each chain is made."""
    from megatron_laer.runtime.comm import layout_index

    places: set[str] = set()

    def place() -> str:
        thread = threading.current_thread().name
        if thread.startswith("fsep-"):
            return thread
        names, frame = set(), sys._getframe(1)
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        return next(name for name in PLACES if name in names)

    def noted(original: Any) -> Any:
        def build(*args: Any) -> Any:
            places.add(place())
            return original(*args)

        return build

    with mock.patch.object(layout_index, "Chain", noted(layout_index.Chain)):
        train_row(command)
    return places


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--fsep-plan-mode forecast --fsep-late-plan wait", {"begin_step"}),
        ("--fsep-restore step --fsep-late-plan wait", {"begin_step"}),
        # Only experts fetched after the gate are indexed after the gate.
        (
            "--fsep-set imbalance_tolerance=0.02 --fsep-late-plan wait",
            {"begin_step", "change", "prepare_backward"},
        ),
        # A reduce goes the way of the restore back.
        ("--fsep-plan-mode exact", {"begin_step", "start_restore"}),
        # Ahead of the gate, each when its restore starts.
        (
            "--fsep-plan-mode announced --moe-enable-routing-replay",
            {"start_restore"},
        ),
        (
            f"--fsep-plan-mode exact {RECOMPUTE}",
            {"begin_step", "start_restore"},
        ),
        (f"--fsep-plan-mode forecast --fsep-late-plan wait {HOMES}", {"begin_step"}),
        # Without replicas there is nothing to index.
        (f"--fsep-plan-mode exact --fsep-set restore_algorithm=flat {HOMES}", {"start_restore"}),
    ],
)
def test_indexes_are_built_where_nothing_waits_for_them(
    ranks: RankPools, text_data: str, flags: str, expected: set[str]
) -> None:
    command = command_line(
        text_data,
        f"--expert-parallel-mode fsep --fsep-sharding rows {flags}",
        global_batch=16,
        steps=4,
    )
    assert ranks(2).run(places_of_builds, command) == [expected] * 2
