"""Fixtures that tests of several tools share."""

from __future__ import annotations

import pytest

from tests.recorded_runs import record_run


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a recorded run."""
    run = tmp_path / "run"
    record_run(run)
    return run


@pytest.fixture
def texts(tmp_path):
    """Return a folder with two files, for a dataset."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_text("first in order")
    return folder
