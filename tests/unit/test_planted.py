"""Each deliberate fault of the tests fits the code; at night those of a table are found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.fake_cuda.fault import Fault as DeviceFault
from tests.fake_cuda.fault import read as read_modules
from tests.planted.__main__ import outcome_of
from tests.planted.faults import FAULTS, Fault, MisfitError, planted
from tests.sequences import fitting, misfit
from tests.unit.test_life_sequences import FAULTS as LIVES
from tests.unit.test_service_sequences import FAULTS as SERVICES


def misfits(fault: Fault) -> MisfitError | None:
    try:
        content = (ROOT / "megatron_laer" / fault.file).read_text()
        assert planted(fault, content) != content, fault.name
    except MisfitError as error:
        return error
    return None


@pytest.mark.texts
def test_the_text_of_every_deliberate_fault_is_in_its_file() -> None:
    """This alone fails for a fault that is not: tests that plant it leave it out."""
    on_the_device = [
        fault
        for folder in ("fake_cuda", "races")
        for fault in read_modules(ROOT / "tests" / folder / "faults.txt").values()
    ]
    found = [misfits(fault) for fault in FAULTS]
    found += [misfit(fault) for fault in (*LIVES, *SERVICES)]
    found += [fault.misfit() for fault in on_the_device]
    assert len(found) >= 300
    assert [str(error) for error in found if error is not None] == []


def test_every_fault_of_the_table_names_its_tests() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        files = [Path(argument) for argument in fault.tests if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), fault.name


def test_a_fault_whose_text_has_moved_is_told_and_never_counts_as_found(tmp_path: Path) -> None:
    said = "the fault's text is not in the file: "
    moved = replace(FAULTS[0], right="moved()")
    (tmp_path / "megatron_laer" / moved.file).parent.mkdir(parents=True)
    (tmp_path / "megatron_laer" / moved.file).write_text("def order_hooks(): pass\n")
    assert outcome_of(moved, tmp_path).startswith(f"does not fit: {said}order_hooks of ")
    of_life = replace(SERVICES[0], right="moved()")
    assert str(misfit(of_life)).startswith(f"{said}PlannerService._drop_oldest has no 'moved()'")
    assert [param.id for param in fitting([of_life, SERVICES[1]])] == [SERVICES[1].name]
    for module in ("megatron_laer.life", "megatron_laer.gone"):
        change = replace(moved, file=module)
        error = DeviceFault([change], "case", "found", ()).misfit()
        assert str(error).startswith(said)


def test_a_fault_changes_the_first_match_in_its_definition() -> None:
    code = "def f(a):\n    return a\nclass C:\n    def f(self, a):\n        return g(a, a) * 2\n"
    fault = Fault("name", "file.py", "C.f", "a", "a + 1", ())
    assert planted(fault, code) == code.replace("g(a, a)", "g((a + 1), a)")
    statement = replace(fault, right="return g(a,\n a) * 2", wrong="pass")
    assert planted(statement, code) == code.replace("return g(a, a) * 2", "pass")
    with pytest.raises(MisfitError, match=r"C\.f of file\.py has no 'h'"):
        planted(replace(fault, right="h"), code)
    with pytest.raises(MisfitError, match=r"file\.py has no C\.g"):
        planted(replace(fault, definition="C.g"), code)


@pytest.mark.nightly
def test_every_deliberate_fault_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
