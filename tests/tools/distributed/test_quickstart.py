"""The quick start trains in turn, shows progress, and compares; for few steps."""

from __future__ import annotations

import json
import re

import pytest

from megatron_laer.files.recording import run_of
from megatron_laer.telemetry.log import read_log
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE
from tests.processes import finished

STEPS = 4


def test_the_quick_start_trains_with_fsep_and_with_stock_and_compares(tmp_path):
    words = f"scripts/quickstart.py --ranks 2 --steps {STEPS} --work-dir".split()
    result = finished(*words, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"step    {STEPS} of {STEPS}, loss") == 4
    for row in ("max/mean tokens per rank", "layouts used", "step time", "processor time"):
        assert row in result.stdout
    compared = re.search(r"^FSEP is [0-9.]+ times as fast[:,]", result.stdout, re.MULTILINE)
    assert bool(compared) != ("too busy to tell" in result.stdout)

    found = json.loads((tmp_path / "result.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["FSEP", "stock", "stock", "FSEP"]
    for run in found["runs"]:
        assert len(run["losses"]) == len(run["step_ms"]) == len(run["load_imbalance"]) == STEPS
        assert len(run["cpu_ms"]) == STEPS - 1 and min(run["cpu_ms"]) > 0
        assert run["losses"][-1] < run["losses"][0]
    fsep, stock = found["runs"][:2]
    # Replicas may move the last printed digit.
    assert fsep["losses"] == pytest.approx(stock["losses"], rel=0, abs=2e-6)
    assert sum(fsep["load_imbalance"]) < sum(stock["load_imbalance"])
    assert stock["layouts"] == 1

    assert "of perfectly balanced speed; stock's placement" in result.stdout
    # By the number that FSEP printed, the report knows whose log it is.
    numbers = {run_of(METRICS.path(tmp_path, 0)), run_of(TRACE.path(tmp_path, 0))}
    assert {step.run for step in read_log("", tmp_path / "fsep.log").steps.values()} == numbers
    assert {step.run for step in read_log("", tmp_path / "stock.log").steps.values()} == {None}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{STEPS} (0 to {STEPS - 1})" in page
