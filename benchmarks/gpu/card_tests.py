"""Tests that need a card, counted while they run.

`python -m benchmarks.gpu.card_tests FILE…`. The result is written after each test, so that a part
that is ended has one too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import Part, show


class Outcomes:
    """Plugin of pytest that counts tests by outcome, and writes the part after each."""

    def __init__(self, json_file: Path | None) -> None:
        self._json_file = json_file
        self._outcomes: dict[str, str] = {}
        self._collected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected = len(session.items)
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # the worst phase of a test counts
            self._outcomes[report.nodeid] = report.outcome
            self.write()

    def part(self) -> Part:
        count = Counter(self._outcomes.values())
        row: dict[str, Any] = {"collected": self._collected, "passed": count["passed"]}
        row |= {"failed": count["failed"], "skipped": count["skipped"]}
        failed = [name for name, outcome in self._outcomes.items() if outcome == "failed"]
        return Part(
            {"Tests that need a card": [row]}, problems=[f"{name} failed" for name in failed]
        )

    def write(self) -> None:
        if self._json_file is not None:
            self._json_file.write_text(json.dumps(asdict(self.part()), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tests that need a card.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seconds", type=float, help="ignored: the caller ends this process")
    parser.add_argument("--dry-run", action="store_true", help="for the tables' titles")
    parser.add_argument("--collect-only", action="store_true", help="run no test")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args(arguments)
    outcomes = Outcomes(options.json)
    words = ["-v", "-m", "gpu", "-p", "no:cacheprovider", *options.files]
    status = int(pytest.main([*words, *["--collect-only"] * options.collect_only], [outcomes]))
    show(outcomes.part(), options.dry_run)
    # Failed tests are problems of a part that has ended well.
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else status


if __name__ == "__main__":
    sys.exit(main())
