"""Fixtures that tests of several tools share."""

from __future__ import annotations

import pytest

from megatron_laer.tools.cli import progress
from tests.recorded_runs import record_run


@pytest.fixture(autouse=True)
def no_plain_progress(monkeypatch):
    """Keep a slow machine from adding lines to stderr."""
    monkeypatch.setattr(progress, "EVERY_S", 1e6)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a recorded run."""
    run = tmp_path / "run"
    record_run(run)
    return run


@pytest.fixture
def texts(tmp_path):
    """Return two files, for a dataset."""
    folder = tmp_path / "texts"
    folder.mkdir()
    files = [folder / "a.txt", folder / "b.txt"]
    files[0].write_text("first in order")
    files[1].write_bytes(bytes(range(256)))
    return files
