"""Ranges of a timeline in the device's profiler, and its files, without a device."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.files import writing
from megatron_laer.telemetry.clock import HostClock
from megatron_laer.telemetry.timeline import FIRST_STEP, NUM_STEPS, Timeline
from megatron_laer.telemetry.trace_events import Activity, Kind


class Ranges:
    """Replacement of the profiler: open ranges, and all closed ones in order."""

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
        timeline.begin_exchange(Activity(Kind.DISPATCH))
        assert ranges.opened == ["dispatch"]
        timeline.end_exchange(Activity(Kind.EXPERTS))
        assert ranges.opened == ["experts"]
        timeline.begin_exchange(Activity(Kind.COMBINE))
        timeline.end_exchange(Activity(Kind.DENSE))
        timeline.end_step(step)
        assert ranges.opened == ([] if recorded else [Kind.DENSE])
        assert ranges.closed[-3:] == (
            ["experts", "combine", Kind.DENSE] if recorded else ["dispatch", "experts", "combine"]
        )
    timeline.close()


def timeline(path: Path, first_step: int = 0) -> Timeline:
    return Timeline(path, 0, HostClock(), Ranges().open, first_step)


def run(path: Path, first_step: int = 0, steps: int = FIRST_STEP + NUM_STEPS) -> None:
    recorded = timeline(path, first_step)
    for step in range(first_step, first_step + steps):
        recorded.begin_step(step)
        recorded.end_step(step)
    recorded.close()


def steps_in(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event["name"].startswith("step ")]


def test_a_new_run_in_a_used_folder_is_refused_and_told_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    run(path)
    content = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"rank-0\.json holds the timeline of an earlier run.*give"
    ):
        timeline(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]


def test_each_resumed_run_has_a_timeline_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    run(path)
    for _ in range(2):
        run(path, first_step=100)
    assert steps_in(path) == ["step 3", "step 4", "step 5"]
    later = ["step 103", "step 104", "step 105"]
    assert steps_in(tmp_path / "rank-0.step-103.json") == later
    assert steps_in(tmp_path / "rank-0.step-103.2.json") == later
    assert len(os.listdir(tmp_path)) == 3


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    tmp_path: Path,
) -> None:
    first = timeline(tmp_path / "rank-0.json")
    with pytest.raises(writing.InUseError, match="another run"):
        timeline(tmp_path / "rank-0.json")
    first.close()
    run(tmp_path / "rank-0.json")


def test_a_run_without_a_recorded_step_leaves_no_file_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "rank-0.json", steps=FIRST_STEP)
    assert os.listdir(tmp_path) == []
    assert "the run ended before step 3" in caplog.text


def test_a_timeline_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run(tmp_path / "rank-0.json")
    assert (tmp_path / "rank-0.json").read_bytes() == b"" and len(os.listdir(tmp_path)) == 1
    assert "could not be written: [Errno 28] No space left" in caplog.text
    monkeypatch.undo()
    run(tmp_path / "rank-0.json")  # an empty file does not block a new one
    assert len(steps_in(tmp_path / "rank-0.json")) == NUM_STEPS
