"""The comparison of the simulator with this machine runs at its smallest; it asserts no time."""

from __future__ import annotations

import json

import pytest

from benchmarks import validate_simulator


@pytest.mark.nightly
def test_steps_are_calibrated_measured_and_predicted(tmp_path):
    output = tmp_path / "x.json"
    assert validate_simulator.main(["--quick", "--json", str(output)]) == 0
    rows = json.loads(output.read_text())["here"]
    assert [row["calibrated"] for row in rows] == [True, True, False, False]
    for row in rows:
        assert set(row) == {"name", "measured_s", "predicted_s", "calibrated"}
        assert row["measured_s"] > 0 and row["predicted_s"] > 0
    # tests/tools/test_simulator_validation.py tests their accuracy, with given times.
    assert rows[2]["name"].startswith("stock, W2") and rows[3]["name"].startswith("fsep, W2")
