"""A run restarted before its first checkpoint goes on; an unrelated one is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_laer.files import run_mark
from megatron_laer.files.recording import RecordingFile
from megatron_laer.files.records import Field, Format, Records
from tests.processes import python

NAME = "group-0.trace"
STEPS = Format("steps", "list of steps", "trace", {}, {"step": (Field("of", "<u4"),)})
REFUSED = "holds the steps of an earlier run, and this run begins at step 0"


@pytest.fixture(autouse=True)
def _no_signs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run_mark.set_checkpoints(None, None, finetune=False)
    yield
    run_mark.set_checkpoints(None, None, finetune=False)


def record(folder: Path, first_step: int, steps: range) -> None:
    file = RecordingFile(folder / NAME, STEPS, {"layers": ["a"]}, first_step, "0123456789abcdef")
    for step in steps:
        file.append("step", step, of=step)
    file.close()


def recorded(path: Path) -> list[int]:
    with path.open("rb") as file:
        records = Records.of(file, path, STEPS)
        return [frame.step for frame, _ in records.read(file, path)]


def resumed_from(folder: Path | None) -> None:
    saved = folder and str(folder)
    run_mark.set_checkpoints(saved, saved, finetune=False)


def test_a_restart_moves_the_steps_before_the_first_checkpoint_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    for attempt in (1, 2):
        record(tmp_path, 0, range(2))
        assert len(caplog.records) == attempt and "from step 0 on has been moved" in caplog.text
    assert "saved" not in (tmp_path / f".{NAME}.run").read_text()
    assert recorded(tmp_path / NAME) == [0, 1]
    assert recorded(tmp_path / "group-0.cut-from-0.trace") == [0, 1, 2]
    assert recorded(tmp_path / "group-0.cut-from-0.2.trace") == [0, 1]


def test_the_same_folder_by_another_name_is_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "link").symlink_to("saved")
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    resumed_from(tmp_path / "link" / ".")
    record(tmp_path, 0, range(1))
    assert recorded(tmp_path / NAME) == [0]


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
    assert recorded(tmp_path / NAME) == [0]
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


def test_a_mark_replaces_a_link_in_its_place_and_not_the_file_behind_it(tmp_path: Path) -> None:
    mine, mark = tmp_path / "mine", tmp_path / f".{NAME}.run"
    mine.write_text("mine")
    mark.symlink_to(mine)
    resumed_from(tmp_path / "saved")
    record(tmp_path, 0, range(3))
    assert mine.read_text() == "mine" and not mark.is_symlink()
    record(tmp_path, 0, range(1))


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
