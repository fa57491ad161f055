"""The table of deliberate faults fits the code; at night all of them are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.planted.__main__ import planted
from tests.planted.faults import FAULTS


def test_every_fault_fits_the_code_and_has_tests() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    for fault in FAULTS:
        content = (ROOT / "megatron_laer" / fault.file).read_text()
        assert planted(fault, content) != content, fault.name
        files = [Path(argument) for argument in fault.tests if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), fault.name


def test_a_text_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="0 times, expected once"):
        planted(FAULTS[0], "")


@pytest.mark.nightly
def test_every_deliberate_fault_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
