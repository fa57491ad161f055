"""Recordings of a run: a second run is refused on every rank, a resumed one goes on with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_laer.cpu.training import Record
from megatron_laer.files.writing import open_exclusively
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.traces.reading import read_recording
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP, HOMES
from tests.records import records_of

SAVED, STEPS = 4, 6
OPTIONS = {"steps": STEPS, "global_batch": 4}

# Recordings, and the file of each that the tests read.
FILES = {
    "layouts": "group-0.layouts",
    "trace": "group-0.trace",
    "metrics": "group-0.metrics",
}


def recording(folder: Path, words: Iterable[str], extra: str = "") -> str:
    recorded = "".join(f" --fsep-record {folder / word} {word}" for word in words)
    return f"{FSEP} --fsep-late-plan wait{recorded}{extra}"


def file_of(folder: Path, word: str) -> Path:
    return folder / word / FILES[word]


def record_run(trained: Trainings, folder: Path, extra: str = "") -> tuple[Path, Record]:
    saved = folder / "saved"
    extra += f" --ckpt-format torch_dist --save {saved} --load {saved} --save-interval {SAVED}"
    return folder, trained(recording(folder, FILES, extra), **OPTIONS)


@pytest.fixture(scope="module")
def first_run(trained: Trainings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    return record_run(trained, tmp_path_factory.mktemp("run"))


def test_a_second_run_beside_the_first_is_refused_on_every_rank(
    trained: Trainings, tmp_path: Path
) -> None:
    path = file_of(tmp_path, "trace")
    path.parent.mkdir(parents=True)
    with open_exclusively(path):
        message = trained.refused(recording(tmp_path, ["trace"]), **OPTIONS)
    assert f"--fsep-record '{path.parent}' trace: " in message
    assert path.name in message and "is being written by another run" in message
    assert path.read_bytes() == b""


def test_a_damaged_recording_of_one_group_stops_the_others_too(
    trained: Trainings, tmp_path: Path
) -> None:
    (tmp_path / "layouts").mkdir()
    (tmp_path / "layouts" / "group-1.layouts").write_text("{}")
    message = trained.refused(recording(tmp_path, ["layouts"]), size=4)
    assert "rank 2" in message and "group-1.layouts" in message


@pytest.mark.parametrize("sharding", ["", HOMES], ids=["rows", "experts at home"])
def test_a_resumed_run_moves_the_steps_that_it_makes_again_aside_and_goes_on(
    trained: Trainings, first_run: tuple[Path, Record], tmp_path: Path, sharding: str
) -> None:
    if sharding:
        first_run = record_run(trained, tmp_path / "first", sharding)
    used = shutil.copytree(first_run[0], tmp_path / "run")
    resume = f"{sharding} --ckpt-format torch_dist --load {used / 'saved'} --ckpt-step {SAVED}"
    record = trained(recording(used, FILES, resume), **OPTIONS)
    assert record.losses == first_run[1].losses[SAVED:]

    # Since the run repeats itself to the bit, the new recording equals the one moved aside.
    for word in ("layouts", "trace"):
        path, old = file_of(used, word), file_of(first_run[0], word)
        assert path.read_bytes() == old.read_bytes()
        assert path.stat().st_ino != old.stat().st_ino
        aside = path.with_stem(f"{path.stem}.cut-from-{SAVED}")
        assert sorted(os.listdir(path.parent)) == sorted([path.name, aside.name])
        if path.suffix == ".layouts":
            assert records_of(aside) == [records_of(old)[0], *records_of(old)[-(STEPS - SAVED) :]]
        else:
            assert sorted(set(read_recording(path).step_R)) == list(range(STEPS))
            assert sorted(set(read_recording(aside).step_R)) == list(range(SAVED, STEPS))

    path = file_of(used, "metrics")
    mine, first = read_metrics(path), read_metrics(file_of(first_run[0], "metrics"))
    assert [step for step, _ in mine.runs] == [0, SAVED]
    assert mine.steps_T.tolist() == list(range(STEPS))
    for name in ("max_over_mean", "predicted_ms"):
        assert (mine.of_layers[name] == first.of_layers[name]).all()
    aside = path.with_stem(f"{path.stem}.cut-from-{SAVED}")
    assert read_metrics(aside).steps_T.tolist() == list(range(SAVED, STEPS))
