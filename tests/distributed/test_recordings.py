"""Recordings of a run: a second run is refused on every rank, a resumed one goes on with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.files.recording import run_of
from megatron_laer.files.writing import open_exclusively
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.traces.reading import read_recording
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.records import records_of

SAVED, STEPS = 4, 6

# Recordings, and the file of each that the tests read.
FILES = {
    "layouts": "group-0.layouts",
    "trace": "group-0.trace",
    "metrics": "group-0.metrics",
}


def flags(data: str, folder: Path, recordings: list[str], extra: str = "") -> list[str]:
    recorded = " ".join(f"--fsep-record {folder / word} {word}" for word in recordings)
    return command_line(
        data,
        " --expert-parallel-mode fsep --fsep-sharding rows --fsep-late-plan wait"
        f" {recorded} {extra}",
        steps=STEPS,
    )


def file_of(folder: Path, word: str) -> Path:
    return folder / word / FILES[word]


def record_run(ranks: RankPools, data: str, folder: Path, extra: str = "") -> tuple[Path, Record]:
    saved = folder / "saved"
    extra += f" --ckpt-format torch_dist --save {saved} --load {saved} --save-interval {SAVED}"
    return folder, ranks(2).run(train, flags(data, folder, list(FILES), extra))[0]


@pytest.fixture(scope="module")
def first_run(
    ranks: RankPools, text_data: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Record]:
    return record_run(ranks, text_data, tmp_path_factory.mktemp("run"))


def test_a_new_run_in_a_used_folder_moves_the_others_recording_aside(
    ranks: RankPools, text_data: str, first_run: tuple[Path, Record], tmp_path: Path
) -> None:
    used = shutil.copytree(first_run[0], tmp_path / "run")
    before = file_of(used, "metrics").read_bytes()
    ranks(2).run(train, flags(text_data, used, ["metrics"], "--train-iters 1"))
    path = file_of(used, "metrics")
    assert path.with_stem("group-0.cut-from-0").read_bytes() == before
    assert read_metrics(path).steps_T.tolist() == [0]
    assert run_of(path) not in (None, run_of(file_of(used, "trace")))


def test_a_second_run_beside_the_first_is_refused_on_every_rank(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path, "trace")
    path.parent.mkdir(parents=True)
    with open_exclusively(path):
        for raised in ranks(2).run_raw(train, flags(text_data, tmp_path, ["trace"])):
            assert raised.type_name == "RefusedError", raised.traceback
            assert f"--fsep-record '{path.parent}' trace: " in raised.message
            assert path.name in raised.message
            assert "is being written by another run" in raised.message
    assert path.read_bytes() == b""


def test_a_damaged_recording_of_one_group_stops_the_others_too(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    (tmp_path / "layouts").mkdir()
    (tmp_path / "layouts" / "group-1.layouts").write_text("{}")
    given = flags(text_data, tmp_path, ["layouts"], "--global-batch-size 8")
    for raised in ranks(4).run_raw(train, given):
        assert raised.type_name == "RefusedError"
        assert "rank 2" in raised.message and "group-1.layouts" in raised.message


@pytest.mark.parametrize("sharding", ["", HOMES], ids=["rows", "experts at home"])
def test_a_resumed_run_moves_the_steps_that_it_makes_again_aside_and_goes_on(
    ranks: RankPools,
    text_data: str,
    first_run: tuple[Path, Record],
    tmp_path: Path,
    sharding: str,
) -> None:
    if sharding:
        first_run = record_run(ranks, text_data, tmp_path / "first", sharding)
    used = shutil.copytree(first_run[0], tmp_path / "run")
    resume = f"{sharding} --ckpt-format torch_dist --load {used / 'saved'} --ckpt-step {SAVED}"
    record = ranks(2).run(train, flags(text_data, used, list(FILES), resume))[0]
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
    recording, first = read_metrics(path), file_of(first_run[0], "metrics")
    assert [step for step, _ in recording.runs] == [0, SAVED]
    assert recording.steps_T.tolist() == list(range(STEPS))
    for name in ("max_over_mean", "predicted_ms"):
        assert (recording.of_layers[name] == read_metrics(first).of_layers[name]).all()
    aside = path.with_stem(f"{path.stem}.cut-from-{SAVED}")
    assert read_metrics(aside).steps_T.tolist() == list(range(SAVED, STEPS))
