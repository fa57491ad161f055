"""Output of the planner benchmark, and its judgement of its own figures."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import by_time, planner, speed
from benchmarks.bounds import must_show
from benchmarks.splits import BalanceRow, Outcome, split_exactly
from benchmarks.trace_cases import Case, Trace
from megatron_laer.planner.layout import ExpertLayout


def row(strategy: str, mode: str, lag: str, capacity: int, **values: float) -> dict[str, Any]:
    return {"strategy": strategy, "mode": mode, "lag": lag, "capacity": capacity, **values}


def test_rows_have_the_promised_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [field.name for field in fields(BalanceRow)] == (
        "strategy mode lag capacity cases mean p95 p99 max violations off_node_share replan_share"
    ).split()
    assert planner.SOLVE_KEYS == ("ranks", "capacity", "experts", "median_ms")
    monkeypatch.setattr(speed, "QUOTA_SHAPES", ((8, 4),))
    (quotas,) = speed.quota_times(1)
    assert list(quotas) == ["ranks", "experts", "capacity", "workload", "median_ms"]
    (solve,) = speed.solve_times(((8, 2, 4),), 1)
    assert set(planner.SOLVE_KEYS) <= set(solve)
    assert solve["median_ms"] == max(solve["fresh_median_ms"], solve["greedy_median_ms"])


def test_a_row_sums_up_its_outcomes() -> None:
    outcomes = [Outcome(1.0, False, 0.1), Outcome(1.5, True, 0.3, replanned=True)]
    summed = BalanceRow.of("greedy", "tolerance", "iteration", 3, outcomes)
    assert (summed.cases, summed.violations, summed.max) == (2, 1, 1.5)
    assert (summed.mean, summed.replan_share) == (1.25, 0.5)
    assert summed.off_node_share == pytest.approx(0.2)


def test_a_violation_is_any_token_above_the_bound() -> None:
    layout = ExpertLayout.from_slots(2, 1, 2, [0, 1])
    assert not split_exactly(np.array([[3, 2], [0, 0]]), layout, 2).violation
    assert split_exactly(np.array([[4, 1], [0, 0]]), layout, 2).violation


def test_bounds_are_judged_by_strategy_mode_lag_and_capacity() -> None:
    result = {
        "solve": [{"ranks": 64, "capacity": 4, "experts": 64, "median_ms": 0.2}],
        "quotas": [{"ranks": 64, "capacity": 2, "experts": 64, "median_ms": 0.1}],
        "balance": [
            row("greedy", "exact", "none", 3, violations=0, off_node_share=0.09),
            row("greedy", "forecast", "iteration", 6, p95=1.0, off_node_share=0.01),
            row("eplb", "forecast", "iteration", 6, p95=9.0, off_node_share=0.5),
        ],
    }
    judged = {figure.figure: figure.met for figure in must_show(result)}
    assert judged == {
        "solve ms, N=64 C=4 E=64": False,
        "quotas ms, N=64 C=2 E=64": True,
        "greedy exact none, C=3: violations": True,
        "greedy exact none, C=3: off_node_share": False,
        "greedy forecast iteration, C=6: p95": True,
        "greedy forecast iteration, C=6: off_node_share": True,
    }


def test_a_trace_gives_only_what_was_known_before_the_case(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 9, (3, 2, 4, 2, 5)).astype(np.int16)
    np.savez(tmp_path / "trace.npz", tokens=tokens)
    trace = Trace(tmp_path / "trace.npz")
    every = trace.cases(1, 0)
    assert len(every) == 2 * 2 * 2
    assert trace.cases(3, 1) == every[1::3]
    first = Case(1, 1, 0)
    assert (trace.now(first) == tokens[1, 1, :, 0]).all()
    # Only iteration 0 precedes it; a forecast from one observation is that observation.
    assert (trace.forecast(first) == 16 * tokens[0, 1].astype(np.int64).sum(axis=1)).all()
    assert trace.before(first) is None
    before_NE = trace.before(Case(1, 1, 1))
    assert before_NE is not None
    assert (before_NE == tokens[1, 1, :, 0]).all()


def test_both_planners_get_the_same_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_time, "CAPACITIES", (4,))
    rng = np.random.default_rng(0)
    share_E = rng.dirichlet(np.full(32, 0.15))
    counts = rng.multinomial(256, share_E, size=(4, 2, 2, 16))
    rows = list(by_time.rows(counts, 1))
    assert len(rows) == 2 * 2 * 3
    # All records but the first, two layers, two microbatches.
    assert {row["cases"] for row in rows} == {3 * 2 * 2}
    by_key = {(row["model"], row["planner"], row["mode"]): row for row in rows}
    for model in by_time.MODELS:
        before, now = (by_key[model, planner, "forecast"] for planner in ("before", "now"))
        assert now["off_node"] < before["off_node"]
        assert now["layer_ms"] < before["layer_ms"]
        assert by_key[model, "now", "exact"]["replanned"] == 1.0
