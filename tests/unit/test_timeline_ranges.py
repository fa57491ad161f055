"""The ranges that a timeline opens in the device's profiler, without a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.telemetry.clock import HostClock
from megatron_laer.telemetry.timeline import DENSE, FIRST_STEP, NUM_STEPS, Timeline

pytestmark = pytest.mark.unit


class Ranges:
    """Stands for the profiler: what is open, and all that was closed, in order."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []

    def open(self, name: str) -> Callable[[], None]:
        self.opened.append(name)

        def close() -> None:
            self.opened.remove(name)
            self.closed.append(name)

        return close


def test_compute_and_token_phases_are_ranges_that_end_where_the_next_begins(tmp_path: Path) -> None:
    ranges = Ranges()
    timeline = Timeline(tmp_path / "rank-0.json", 0, HostClock(), ranges.open, 0)
    for step in range(FIRST_STEP + NUM_STEPS + 1):
        recorded = FIRST_STEP <= step < FIRST_STEP + NUM_STEPS
        ranges.closed.clear()
        timeline.begin_step(step)
        timeline.begin_exchange("dispatch")
        assert ranges.opened == ["dispatch"]
        timeline.end_exchange("experts")
        assert ranges.opened == ["experts"]
        timeline.begin_exchange("combine")
        timeline.end_exchange(DENSE)
        timeline.end_step(step)
        assert ranges.opened == ([] if recorded else [DENSE])
        assert ranges.closed[-3:] == (
            ["experts", "combine", DENSE] if recorded else ["dispatch", "experts", "combine"]
        )
    timeline.close()
