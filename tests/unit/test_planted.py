"""Each deliberate fault fits the code and names tests; at night all of them are found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.planted.faults import FAULTS, Fault, planted


def test_every_fault_fits_the_code_and_names_its_tests() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 193
    for fault in FAULTS:
        content = (ROOT / "megatron_laer" / fault.file).read_text()
        assert planted(fault, content) != content, fault.name
        files = [Path(argument) for argument in fault.tests if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), fault.name


def test_a_fault_changes_the_first_match_in_its_definition() -> None:
    code = "def f(a):\n    return a\nclass C:\n    def f(self, a):\n        return g(a, a) * 2\n"
    fault = Fault("name", "file.py", "C.f", "a", "a + 1", ())
    assert planted(fault, code) == code.replace("g(a, a)", "g((a + 1), a)")
    statement = replace(fault, right="return g(a,\n a) * 2", wrong="pass")
    assert planted(statement, code) == code.replace("return g(a, a) * 2", "pass")
    with pytest.raises(ValueError, match=r"C\.f of file\.py has no 'h'"):
        planted(replace(fault, right="h"), code)
    with pytest.raises(ValueError, match=r"file\.py has no C\.g"):
        planted(replace(fault, definition="C.g"), code)


@pytest.mark.nightly
def test_every_deliberate_fault_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
