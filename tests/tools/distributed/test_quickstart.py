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
    assert f"Balance and times are of the iterations 3 to {STEPS}." in result.stdout
    said = " ".join(result.stdout.split())
    measured = r"FSEP is [0-9.]+ times as fast as stock, measured in the iterations 3 to 4 of "
    is_busy = "No speedup is claimed, since this machine is too busy for one: " in said
    is_doubtful = "No speedup is claimed: in the iterations 3 to 4 of " in said
    assert bool(re.search(measured, said)) + is_busy + is_doubtful == 1
    # The page says what the command said, and has no gain where that claims none.
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert is_busy == (", measured in the" not in page and not is_doubtful)
    assert (tmp_path / "stock.log").exists() != is_busy

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

    assert "of perfectly balanced speed; stock&#39;s placement" in page
    # By the number that FSEP printed, the report knows whose log it is.
    numbers = {run_of(METRICS.path(tmp_path, 0)), run_of(TRACE.path(tmp_path, 0))}
    assert {step.run for step in read_log("", tmp_path / "fsep.log").steps.values()} == numbers
    stock = tmp_path / ("stock.log.disturbed" if is_busy else "stock.log")
    assert {step.run for step in read_log("", stock).steps.values()} == {None}
    assert f"{STEPS} (1 to {STEPS})" in page
