"""Workers get the longest units of work first, by figures of files that exist."""

from __future__ import annotations

from tests.documents import ROOT
from tests.durations import PARITY, recorded, unit_of


def test_files_with_a_figure_exist() -> None:
    assert [name for name in recorded() if not (ROOT / name).is_file()] == []
    assert PARITY in recorded()


def test_a_unit_of_work_is_a_file_or_the_rows_of_a_stock_run() -> None:
    assert unit_of("tests/unit/test_a.py::test_b[c]") == "tests/unit/test_a.py"
    rows = [
        f"{PARITY}::test_fsep_equals_stock[{row}]" for row in ("exact", "hybridep-home", "bf16")
    ]
    exact, hybridep, bf16 = map(unit_of, rows)
    assert exact == hybridep != bf16
    assert unit_of(f"{PARITY}::test_another") == PARITY
