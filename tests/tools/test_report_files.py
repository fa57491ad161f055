"""Unusable files of a run are refused by name, and no page replaces one of its files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.telemetry.metrics_file import recording_path
from tests import fuzz
from tests.recorded_runs import RUN, record_run
from tests.tools.plan_cases import drifting_trace, recording
from tests.tools.report_pages import report, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    record_run(run)
    return run


_EIO = "[Errno 5] Input/output error"


def _logged(folder: Path, content: bytes) -> None:
    (folder / "train.log").write_bytes(content)


def _linked(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read


def _doubled(folder: Path, name: str) -> None:
    (folder / name.replace("0", "00")).write_bytes((folder / name).read_bytes())


def _negative(folder: Path) -> None:
    path = recording_path(folder, 0)
    lines = re.sub(r'"max_over_mean":\[[^,]*', '"max_over_mean":[-3', path.read_text()).splitlines()
    path.write_text("".join(f"{fuzz.resealed(line)}\n" for line in lines))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda run: _logged(run, b"\0" * (2**25 + 1)),
            "train.log, line 1: longer than 33,554,432",
        ),
        (lambda run: _linked(run, "train.log"), f"{_EIO}: '{{folder}}/train.log'"),
        (lambda run: _linked(run, "group-0.jsonl"), f"{_EIO}: '{{folder}}/group-0.jsonl'"),
        (lambda run: _linked(run, "group-0.trace"), f"{_EIO}: '{{folder}}/group-0.trace'"),
        (lambda run: _linked(run, "metrics-0.jsonl"), f"{_EIO}: '{{folder}}/metrics-0.jsonl'"),
        (lambda run: _doubled(run, "metrics-0.jsonl"), "metrics-00.jsonl' are both of group 0"),
        (lambda run: _doubled(run, "group-0.trace"), "group-00.trace' are both of group 0; move"),
        (_negative, "step 0: max_over_mean of 'layer 1' is -3, which is never below 1"),
    ],
    ids=["long line", "log", "layouts", "trace", "metrics", "two metrics", "two traces", "ratio"],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    says: str,
) -> None:
    spoil(folder)
    says = says.format(folder=folder)
    assert report(folder, "--out", tmp_path / "page.html") == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["metrics-1.jsonl", "group-7.trace", "group-007.jsonl", "new.log", "link.html"]
)
def test_no_page_is_written_under_a_name_that_is_read_the_next_time(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (folder / "link.html").symlink_to("new.log")
    trace = recording(tmp_path / "x.trace", drifting_trace(steps=2))
    for words in ((folder,), (folder / "group-0.trace",), (trace, "--compare", folder)):
        assert report(*words, "--out", folder / name) == 2
        assert "would be read as a file of the run the next time" in capsys.readouterr().err
    # Another folder or name is allowed.
    assert report(folder, "--out", tmp_path / name) == 0
    assert report(folder, "--out", folder / f"{name}.html") == 0


def test_texts_that_are_not_utf_8_are_shown_with_escapes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    record_run(folder, run=RUN | {"planner": "\udce9"})
    page = written(tmp_path, folder)
    assert "caf\\udce9</h1>" in page and "<td>\\udce9</td>" in page
