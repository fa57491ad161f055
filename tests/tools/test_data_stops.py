"""`prepare-data` as a command: stopped at work, and its messages where it cannot work."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer.tools import data
from tests.processes import default_signals, python_path

# A tokenizer that stops at its second document for the duration of this test.
_TRANSFORMERS = """
import sys

class AutoTokenizer:
    eos_token_id = 7

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        return cls()

    def __init__(self):
        self.documents = 0

    def __len__(self):
        return 100

    def encode(self, text, add_special_tokens):
        self.documents += 1
        if self.documents == 2:
            print("at work", flush=True)
            sys.stdin.read()
        return [5] * len(text)
"""


def command(*words):
    return [sys.executable, "-m", "megatron_laer", "prepare-data", *map(str, words)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "transformers.py").write_text(_TRANSFORMERS)
    (tmp_path / "old.txt").write_text("old")
    data.prepare_data([tmp_path / "old.txt"], tmp_path / "out" / "train", progress=False)
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text("x" * 2**16)
    return tmp_path


@pytest.fixture
def at_work(folder):
    with subprocess.Popen(
        command(
            *("--input", folder / "first.txt", folder / "second.txt"),
            *("--output", folder / "out" / "train", "--tokenizer", "some/name"),
        ),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "modules"), python_path()])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    ) as process:
        try:
            assert process.stdout.readline() == "at work\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def temporary(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name.startswith(".train.bin.")]


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 143, ""),
        (signal.SIGINT, 130, "python -m megatron_laer prepare-data: interrupted\n"),
    ],
    ids=["terminated", "interrupted"],
)
def test_a_stopped_command_leaves_the_old_dataset_alone(number, status, message, folder, at_work):
    (written,) = temporary(folder / "out")
    assert written.stat().st_size >= 2**16
    at_work.send_signal(number)
    _, error = at_work.communicate()
    assert (at_work.returncode, error) == (status, message)
    left = content(folder / "out")
    assert set(left) == {"train.bin", "train.idx"}
    assert left["train.bin"] == bytes([*b"o\0l\0d\0", 0, 1])


def test_a_second_command_is_refused_and_tidies_up_after_a_killed_one(folder, at_work):
    before = content(folder / "out")

    def prepare_data():
        data.prepare_data([folder / "old.txt"], folder / "out" / "train", progress=False)

    with pytest.raises(ValueError, match=r"--output .*train' is being written by another run"):
        prepare_data()
    assert content(folder / "out") == before
    at_work.kill()
    at_work.wait()
    assert temporary(folder / "out")
    prepare_data()
    assert set(content(folder / "out")) == {"train.bin", "train.idx"}
