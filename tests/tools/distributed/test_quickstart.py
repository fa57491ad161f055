"""The quick start trains twice, shows progress, and compares its counts; for few steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_laer.tools.cli.program import ended
from tests import processes

_ROOT = Path(__file__).resolve().parents[3]
STEPS = 4


def test_the_quick_start_trains_with_fsep_and_with_stock_and_compares(tmp_path: Path) -> None:
    words = f"scripts/quickstart.py --ranks 2 --steps {STEPS} --work-dir".split()
    result = processes.run(
        [sys.executable, *words, str(tmp_path)],
        timeout_s=1800.0,
        env=os.environ | {"PYTHONPATH": processes.python_path()},
        cwd=_ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"step    {STEPS} of {STEPS}, loss") == 2
    for row in ("validation loss", "max/mean tokens per rank", "layouts used", "step time"):
        assert row in result.stdout

    found = json.loads((tmp_path / "result.json").read_text())
    fsep, stock = found["runs"]
    assert (fsep["name"], stock["name"]) == ("FSEP", "stock")
    for run in (fsep, stock):
        assert len(run["losses"]) == len(run["step_ms"]) == len(run["load_imbalance"]) == STEPS
        assert run["losses"][-1] < run["losses"][0]
        assert all(1.0 <= value <= 2.0 for value in run["load_imbalance"])
    assert sum(fsep["load_imbalance"]) < sum(stock["load_imbalance"])
    assert stock["layouts"] == 1

    assert "of forced balance; imbalance cost" in result.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{STEPS} (0 to {STEPS - 1})" in page


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "'0' is no integer in 1..100000"),
        (["--steps", "9" * 30], "is no integer in 1..100000"),
        (["--work-dir", ""], "--work-dir '': the path is empty"),
        (["--work-dir", "/dev/null/x"], "is no folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from scripts import quickstart

    try:
        status = ended("scripts/quickstart.sh", lambda: quickstart.main(words))
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    assert said in capfd.readouterr().err
