"""Cases and outcomes of the planner benchmark, and its rivals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.splits import (
    split_exactly,
)
from benchmarks.trace_cases import Case, Trace
from megatron_laer.planner.layout import ExpertLayout


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


def test_a_violation_is_any_token_above_the_bound() -> None:
    layout = ExpertLayout.from_slots(2, 1, 2, [0, 1])
    assert not split_exactly(np.array([[3, 2], [0, 0]]), layout, 2).violation
    assert split_exactly(np.array([[4, 1], [0, 0]]), layout, 2).violation
