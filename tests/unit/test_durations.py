"""Workers get the longest units of work first, by figures of files that exist."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import durations
from tests.documents import ROOT
from tests.durations import PARITY, longest_first, measure, recorded, unit_of, write


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


def test_the_longest_units_come_first_and_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "recorded", lambda: {"tests/unit/test_long.py": 50.0})
    tests = [f"tests/{name}" for name in ("unit/test_short.py::a", "distributed/test_new.py::a")]
    tests += ["tests/unit/test_long.py::a", "tests/unit/test_short.py::b"]
    places = longest_first(tests)
    assert sorted(tests, key=lambda name: places[name]) == [tests[2], tests[1], tests[0], tests[3]]


def test_only_a_whole_day_is_measured_and_written(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    options = {"markexpr": "not gpu and not nightly", "keyword": "", "ignore": None}
    config: Any = SimpleNamespace(
        getoption=lambda name: options[name],
        args_source=pytest.Config.ArgsSource.TESTPATHS,
        cache=SimpleNamespace(set=lambda name, value: kept.update({name: dict(value)})),
    )
    reports = [
        SimpleNamespace(nodeid=f"tests/unit/test_a.py::{name}", duration=seconds)
        for name, seconds in (("one", 1.0), ("one", 0.25), ("two", 2.0))
    ]
    options["keyword"] = "one"
    measure(config, reports)
    assert not kept
    options["keyword"] = ""
    measure(config, reports)
    (seconds,) = kept.values()
    assert seconds == {"tests/unit/test_a.py": 3.25}
    write(seconds, tmp_path / "durations.csv")
    assert (tmp_path / "durations.csv").read_text() == "file,seconds\ntests/unit/test_a.py,3.2\n"
