"""Benchmarks and the paper's experiments end like commands when stopped or without a reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import default_signals, python_path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    ("-m", "benchmarks.planner"),
    ("scripts/paper/figure8.py", "--toy"),
)


def started(words: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    work_dir = ["--work-dir", str(folder)] if words[0] != "-m" else []
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *words, *work_dir],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: words[-1])
def test_ctrl_c_is_one_line_and_status_130(words: tuple[str, ...], tmp_path: Path) -> None:
    process = started(words, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    name = " ".join(["python", *words] if words[0] == "-m" else words[:1])
    assert errors == f"{name}: interrupted\n"


@pytest.mark.parametrize("words", PROGRAMS[:1], ids=lambda words: words[-1])
def test_a_reader_that_goes_away_is_no_error(words: tuple[str, ...], tmp_path: Path) -> None:
    process = started(words, tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141
    assert errors == ""
