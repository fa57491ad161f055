"""Recorded durations of test files, by which pytest orders tests and spreads them over workers.

    scripts/test.sh --all
    python -m tests.durations

writes `durations.csv`. The longest unit of work goes first: a file, or in the parity table the rows
that share a stock run, whose figures are the file's in equal parts. A file that is not there yet
counts by its number of tests.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.documents import ROOT

FILE = Path(__file__).with_name("durations.csv")
PARITY = "tests/distributed/test_parity.py"
# Of one test in a file without a figure, by its folder.
UNKNOWN_S = {"distributed": 4.0}
OTHERS_S = 0.2

# The whole set of a day, as scripts/test.sh asks for it, and the place in pytest's cache.
_WHOLE = "not gpu and not nightly"
_MEASURED = "megatron_laer/seconds"


class ByUnits(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker all tests of a unit of work, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """Return the file of a test, or for a parity row its first one with the same stock run."""
    file, _, name = nodeid.partition("::")
    if file != PARITY or "[" not in name:
        return file
    from tests.parity.daily import sharing

    return f"{file}[{sharing()[name.partition('[')[2].removesuffix(']')]}]"


def longest_first(nodeids: Iterable[str]) -> dict[str, int]:
    """Return a place for each test, which sorts units of work by their time."""
    units = {nodeid: unit_of(nodeid) for nodeid in nodeids}
    of_unit = Counter(units.values())
    of_file = Counter(_file(unit) for unit in units.values())
    seconds = recorded()

    def time_s(unit: str) -> float:
        file, tests = _file(unit), of_unit[unit]
        if file in seconds:
            return seconds[file] * tests / of_file[file]
        return UNKNOWN_S.get(Path(file).parent.name, OTHERS_S) * tests

    places = {unit: at for at, unit in enumerate(sorted(of_unit, key=lambda u: (-time_s(u), u)))}
    return {nodeid: places[unit] for nodeid, unit in units.items()}


@cache
def recorded() -> Mapping[str, float]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return {line["file"]: float(line["seconds"]) for line in csv.DictReader(file)}


def measure(config: pytest.Config, reports: Iterable[Any]) -> None:
    """Keep the seconds of each file, if this session ran the whole set of a day."""
    is_whole = config.getoption("markexpr") == _WHOLE
    left_out = config.getoption("keyword") or config.getoption("ignore")
    if is_whole and not left_out and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        seconds = Counter[str]()
        for report in reports:
            seconds[_file(report.nodeid.partition("::")[0])] += report.duration
        config.cache.set(_MEASURED, seconds)


def write(seconds: Mapping[str, float], path: Path = FILE) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "seconds"])
        writer.writerows([name, f"{seconds[name]:.1f}"] for name in sorted(seconds))


def _file(unit: str) -> str:
    return unit.partition("[")[0]


def main() -> int:
    measured = ROOT / ".pytest_cache" / "v" / _MEASURED
    if not measured.exists():
        print("no session has run the whole set; run scripts/test.sh --all", file=sys.stderr)
        return 1
    write(json.loads(measured.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
