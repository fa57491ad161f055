"""The simulator against published times, where the artifact is; fits and scores without."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import measured_cells, published_cells, validate_simulator
from benchmarks.published_cells import Constants, fit
from benchmarks.published_files import Cell
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.tools.simulator.iteration.rates import Rates
from tests import shared_data

needs_files = shared_data.needs("laer_ae_e2e_wikitext.csv")


def test_a_fit_finds_the_constants_that_made_the_times():
    slopes = np.array([[1.0, 0.2, 0.0], [1.0, 0.0, 0.5], [1.0, 0.6, 0.1], [1.0, 0.1, 0.0]])

    def predict(at):
        return 10 + slopes @ np.array([at.backward, at.drift, at.kappa])

    found = fit(predict, predict(Constants(1.4, 0.6, 1.2)), Constants(1.2, 0.3, 1.0))
    assert [found.constants.backward, found.constants.drift] == pytest.approx([1.4, 0.6], abs=0.01)
    assert found.constants.kappa == pytest.approx(1.2, abs=0.02)
    assert found.error < 1e-4


def test_two_balanced_times_give_the_two_constants(tmp_path):
    jobs = list(measured_cells.jobs_of(tmp_path, quick=True))
    rates = Rates(load_cluster("cpu-gloo"), bytes_per_element=4)
    made = replace(rates, overhead=2.5, gap_s=0.04)
    known = [(job, measured_cells.predicted_seconds(job, made)) for job in jobs[:2]]
    found = measured_cells.fitted(rates, known)
    assert (found.overhead, found.gap_s) == pytest.approx((2.5, 0.04))
    # Only the smaller size is slow: the gap would be negative.
    noisy = [known[0], (known[1][0], known[1][1] / 10)]
    found = measured_cells.fitted(rates, noisy)
    assert found.overhead > 0 and found.gap_s == 0.0
    # W2 gives one of stock's two ranks three tokens of four.
    stock_s, fsep_s = (measured_cells.predicted_seconds(job, made) for job in jobs[2:])
    assert fsep_s < stock_s


def test_scores_count_pairs_and_errors():
    times = {"a": (10.0, 11.0), "b": (12.0, 12.0), "c": (12.3, 11.5), "d": (20.0, 20.0)}
    row = {"cell": "wikitext, qwen-x", "fitted": False}
    rows = [
        {**row, "method": method, "measured_s": measured_s, "predicted_s": predicted_s}
        | {"prior_s": measured_s / 2, "naive_s": measured_s}
        for method, (measured_s, predicted_s) in times.items()
    ]
    rows += [{**row, "cell": "mixtral-8x22b"} for row in rows]
    rows += [{**row, "cell": "mixtral-8x7b", "fitted": True} for row in rows[:2]]
    line = next(
        line for line in validate_simulator.score(rows) if line["cells"] == "unseen, Qwen-8x7B"
    )
    # c is predicted below b, from which it differs by less than 5 %.
    assert line["pairs_right"] == "5/6" and line["pairs_over_5_percent"] == "5/5"
    assert line["predicted_mape"] == pytest.approx((0.1 + 0 + 0.8 / 12.3 + 0) / 4)
    assert (line["prior_mape"], line["naive_mape"]) == (0.5, 0.0)


def test_naive_times_are_scaled_by_flops():
    cells = [
        Cell("wikitext", model, "0.0", "LAER", seconds)
        for model, seconds in (("mixtral-8x7b-e8k2", 20.0), ("mixtral-8x22b-e8k2", 21.0))
    ]
    flops = [published_cells.model_of(cell.model).flops_per_token for cell in cells]
    assert validate_simulator.naive_seconds(cells[1], cells) == 20.0 * flops[1] / flops[0]
    assert validate_simulator.naive_seconds(cells[0], cells) == 20.0


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    assert validate_simulator.main(["--no-here", "--published", str(tmp_path)]) == 1
    assert "has no laer_ae_e2e_wikitext.csv" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to compare: give --published, or leave --no-h"):
        validate_simulator.main(["--no-here"])


@needs_files
def test_published_cells_are_predicted(tmp_path):
    """Use a part of the routing for speed; the docs' figures use all of it."""
    output = tmp_path / "x.json"
    words = ["--no-here", "--quick", "--published", str(shared_data.FOLDER), "--json", str(output)]
    assert validate_simulator.main(words) == 0
    written = json.loads(output.read_text())
    assert written["here"] == [] and len(written["published"]) == 48
    keys = {"cell", "method", "measured_s", "predicted_s", "low_s", "high_s", "naive_s", "fitted"}
    for row in written["published"]:
        assert keys <= set(row)
        assert row["low_s"] <= row["predicted_s"] <= row["high_s"]
    assert sum(row["fitted"] for row in written["published"]) == 16
    unseen = next(line for line in written["scores"] if line["cells"] == "unseen")
    assert unseen["predicted_mape"] < 0.06 < unseen["prior_mape"]
