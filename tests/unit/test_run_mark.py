"""A run restarted before its first checkpoint goes on; an unrelated one is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_laer.files import run_mark, writing
from megatron_laer.files.recording import RecordingFile
from megatron_laer.telemetry.clock import HostClock
from megatron_laer.telemetry.timeline import FIRST_STEP, NUM_STEPS, Timeline
from megatron_laer.telemetry.trace_events import Activity, Kind
from tests.processes import python

HEADER, NAME = b"header\n", "group-0.trace"
REFUSED = "holds the (steps|timeline) of an earlier run, and this run begins at step 0"


@pytest.fixture(autouse=True)
def _no_signs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run_mark.set_checkpoints(None, None, finetune=False)
    yield
    run_mark.set_checkpoints(None, None, finetune=False)


def record(folder: Path, first_step: int, steps: range) -> int | None:
    def records(path: Path) -> list[tuple[int, int]]:
        lines = path.read_bytes()[len(HEADER) :].split()
        return [(int(line), len(HEADER) + 2 * (n + 1)) for n, line in enumerate(lines)]

    file = RecordingFile(folder / NAME, HEADER, [], records, first_step)
    for step in steps:
        file.append(b"%d\n" % step)
    file.close()
    return file.last


def resumed_from(folder: Path | None) -> None:
    saved = folder and str(folder)
    run_mark.set_checkpoints(saved, saved, finetune=False)


def test_a_restart_moves_the_steps_before_the_first_checkpoint_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    for attempt in (1, 2):
        assert record(tmp_path, 0, range(2)) is None
        assert len(caplog.records) == attempt and "from step 0 on has been moved" in caplog.text
    assert "saved" not in (tmp_path / f".{NAME}.run").read_text()
    assert (tmp_path / NAME).read_bytes() == HEADER + b"0\n1\n"
    assert (tmp_path / "group-0.cut-from-0.trace").read_bytes() == HEADER + b"0\n1\n2\n"
    assert (tmp_path / "group-0.cut-from-0.2.trace").read_bytes() == HEADER + b"0\n1\n"


def test_the_same_folder_by_another_name_is_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "link").symlink_to("saved")
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    resumed_from(tmp_path / "link" / ".")
    record(tmp_path, 0, range(1))
    assert (tmp_path / NAME).read_bytes() == HEADER + b"0\n"


@pytest.mark.parametrize("before", ["saved", None], ids=["another run", "a run without signs"])
@pytest.mark.parametrize("now", ["other", None], ids=["other checkpoints", "no checkpoints"])
def test_an_unrelated_run_is_refused_however_often_it_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, now: str | None
) -> None:
    resumed_from(before and tmp_path / before)
    record(tmp_path, 0, range(3))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resumed_from(now and tmp_path / now)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for restart in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        with pytest.raises(ValueError, match=REFUSED):
            record(tmp_path, 0, range(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_ranks_that_one_launcher_starts_again_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    record(tmp_path, 0, range(3))
    record(tmp_path, 0, range(1))
    assert (tmp_path / NAME).read_bytes() == HEADER + b"0\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    with pytest.raises(ValueError, match=REFUSED):
        record(tmp_path, 0, range(3))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    program = (
        "from pathlib import Path; from megatron_laer.files import run_mark;"
        f"print(run_mark.is_of_this_run(Path({str(tmp_path / NAME)!r})))"
    )
    assert python("-c", program) == "False\n"


def test_the_last_run_that_wrote_is_the_one_that_may_restart(tmp_path: Path) -> None:
    resumed_from(tmp_path / "first")
    record(tmp_path, 0, range(3))
    resumed_from(tmp_path / "second")
    record(tmp_path, 2, range(2, 4))  # resumed from a copy of the first one's checkpoints
    resumed_from(tmp_path / "first")
    with pytest.raises(ValueError, match=REFUSED):
        record(tmp_path, 0, range(1))
    # A run without signs removes the mark.
    resumed_from(None)
    record(tmp_path, 3, range(3, 4))
    assert not (tmp_path / f".{NAME}.run").exists()


@pytest.mark.parametrize(
    ("load", "save", "finetune"),
    [("saved", "saved", True), ("given", "saved", False), ("saved", None, False)],
    ids=["fine-tuned anew at each start", "loaded from elsewhere", "not saved"],
)
def test_a_run_that_would_not_go_on_from_its_own_checkpoints_is_refused(
    tmp_path: Path, load: str, save: str | None, finetune: bool
) -> None:
    run_mark.set_checkpoints(load, save, finetune=finetune)
    record(tmp_path, 0, range(3))
    with pytest.raises(ValueError, match=REFUSED):
        record(tmp_path, 0, range(3))


@pytest.mark.parametrize("content", [b"", b"\xff\x00" * 100, b"x" * 2000, None])
def test_a_damaged_mark_is_none(tmp_path: Path, content: bytes | None) -> None:
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    mark = tmp_path / f".{NAME}.run"
    if content is None:
        mark.unlink()
        mark.mkdir()
    else:
        mark.write_bytes(content)
    with pytest.raises(ValueError, match=REFUSED):
        record(tmp_path, 0, range(1))


def run_with_timeline(path: Path, steps: int) -> None:
    timeline = Timeline(path, 0, HostClock(), lambda _: lambda: None, 0)
    for step in range(steps):
        timeline.begin_step(step)
        timeline.end_step(step)
    timeline.close()


def test_a_restart_moves_its_timeline_aside_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rank-0.json"
    resumed_from(tmp_path / "saved")
    run_with_timeline(path, 9)
    first = path.read_bytes()
    run_with_timeline(path, 9)
    assert (tmp_path / "rank-0.cut-from-0.json").read_bytes() == first
    assert json.loads(path.read_text())["traceEvents"]
    assert "has been moved to rank-0.cut-from-0.json" in caplog.text
    resumed_from(tmp_path / "other")
    with pytest.raises(ValueError, match=REFUSED):
        run_with_timeline(path, 9)


def test_a_run_without_a_recorded_step_leaves_no_file_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed_from(tmp_path / "saved")
    run_with_timeline(tmp_path / "rank-0.json", FIRST_STEP)
    assert os.listdir(tmp_path) == []
    assert f"the run ended before step {FIRST_STEP + 1}" in caplog.text


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
