"""Reported balance equals balance counted by hand."""

from __future__ import annotations

import numpy as np

from megatron_laer.config import Split
from megatron_laer.planner.balance import (
    fsep_tokens_N,
    max_over_mean,
    stock_tokens_N,
)
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import solve_quotas
from tests.oracles.planner import quota_NS


def test_max_over_mean_of_an_even_load_is_one_and_of_a_single_rank_is_their_number() -> None:
    assert max_over_mean(np.array([5, 5, 5])) == 1.0
    assert max_over_mean(np.array([0, 9, 0])) == 3.0
    assert max_over_mean(np.zeros(4, dtype=np.int64)) == 1.0


def test_stock_ranks_own_consecutive_experts() -> None:
    counts_NE = np.array([[1, 2, 3, 4], [10, 20, 30, 40]])
    assert stock_tokens_N(counts_NE).tolist() == [33, 77]


def test_fsep_tokens_are_the_columns_of_the_quotas() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        layout = ExpertLayout.random(4, 3, 6, (seed,))
        counts_NE = rng.integers(0, 50, (4, 6))
        even = solve_quotas(Split.EVEN, counts_NE, layout, 2)
        expected = quota_NS(counts_NE, layout, 2).sum(0).reshape(4, 3).sum(1)
        assert fsep_tokens_N(even).tolist() == expected.tolist()
        exact = solve_quotas(Split.EXACT, counts_NE, layout, 2)
        columns = [exact.rank_columns(rank).sum() for rank in range(4)]
        assert fsep_tokens_N(exact).tolist() == columns
        assert max(columns) <= expected.max()
