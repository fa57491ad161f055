"""Cases and outcomes of the planner benchmark, and its rivals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.rivals.eplb import Eplb
from benchmarks.splits import (
    BalanceRow,
    Outcome,
    Planner,
    split_evenly,
    split_exactly,
    split_like_eplb,
)
from benchmarks.trace_cases import Case, Trace
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


def test_a_row_sums_up_its_outcomes_and_a_violation_is_any_token_above_the_bound() -> None:
    outcomes = [Outcome(1.0, False, 0.1), Outcome(1.5, True, 0.3)]
    summed = BalanceRow.of("greedy", "forecast", "iteration", 3, outcomes)
    assert (summed.cases, summed.violations, summed.max) == (2, 1, 1.5)
    assert summed.mean == 1.25
    assert summed.off_node_share == pytest.approx(0.2)
    layout = ExpertLayout.from_slots(2, 1, 2, [0, 1])
    assert not split_exactly(np.array([[3, 2], [0, 0]]), layout, 2).violation
    assert split_exactly(np.array([[4, 1], [0, 0]]), layout, 2).violation


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


@pytest.mark.parametrize("shape", [(16, 32, 3), (8, 5, 4), (4, 12, 3), (1, 3, 3)])
def test_the_rival_plans_legal_layouts(shape: tuple[int, int, int]) -> None:
    num_ranks, num_experts, capacity = shape
    geometry = Geometry(num_ranks, num_experts, capacity, num_ranks)
    planner: Planner = Eplb(geometry)
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    for seed in range(5):
        counts_NE = np.random.default_rng(seed).integers(0, 9, (num_ranks, num_experts)) ** 3
        geometry.check_layout(planner.plan(counts_NE * (seed > 0), static))


def test_the_rival_beats_equal_replicas_on_a_skewed_load() -> None:
    geometry = Geometry(16, 32, 4, 8)
    share_E = 1.0 / np.arange(1, 33) ** 1.2
    counts_NE = np.random.default_rng(0).multinomial(4096, share_E / share_E.sum(), size=16)
    static = ExpertLayout.static(16, 4, 32)
    equal = ExpertLayout.from_slots(16, 4, 32, np.arange(64) % 32)
    even = split_evenly(counts_NE, equal, 8)
    eplb = split_like_eplb(counts_NE, Eplb(geometry).plan(counts_NE, static), 8)
    assert eplb.ratio < 1.2 < even.ratio
