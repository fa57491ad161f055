"""The GPU check runs from end to end on the labelled device: every part, on one rank and on two.

The part that judges layers runs each day; gradients, exchanges and races have daily tests of their
own. A finding that would be an error on a card fails a part.
"""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.report import DRY
from tests.processes import python_path
from tests.unit.shell_scripts import shell

_CHECK = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"


@pytest.mark.parametrize(
    "parts",
    [
        ["layer"],
        pytest.param(PARTS, marks=pytest.mark.nightly),
    ],
    ids=["daily", "all"],
)
def test_parts_run_without_a_card(tmp_path, parts):
    result = shell(
        *(_CHECK, "--dry-run", "--ranks", "2", "--output", tmp_path, "--parts", ",".join(parts)),
        timeout_s=1800,
        PYTHON=sys.executable,
        PYTHONPATH=python_path(),
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    written = json.loads((tmp_path / "result.json").read_text())
    assert {title.split()[0] for title in written["parts"]} == set(parts)
    page = (tmp_path / "rows.md").read_text()
    for name, part in written["parts"].items():
        assert part["tables"] and not part["problems"], name
        for title, rows in part["tables"].items():
            assert rows, f"{name}: {title} is empty"
            assert f"{title} ({DRY})" in result.stdout
            assert f"**{title}** ({DRY})" in page
    measured = result.stdout.partition("== what matters most")[2]
    assert ("not measured" in measured) == (set(parts) != set(PARTS)), measured
    assert written["about"]["command"].startswith("scripts/gpu_check.sh --dry-run")
