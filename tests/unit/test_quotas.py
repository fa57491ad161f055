"""Both splits equal their looped definitions; the exact one is minimal by linear programs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import Split
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import solve_quotas
from tests.oracles.exact import exact_quota_NS, off_node_tokens, off_rank_tokens
from tests.oracles.planner import quota_NS
from tests.unit.planner_cases import KINDS, counts_of, geometries, with_holes

Case = tuple[Int64, ExpertLayout, int]

# Bound of off-rank tokens over the optimum among splits with the fewest off-node tokens, for
# several nodes of several ranks; otherwise there is no gap. In 1,478 random cases with more than 20
# such tokens: mean 1.011, 99th percentile below 1.18, worst 1.47.
OFF_RANK_MEAN_GAP = 1.03
OFF_RANK_LARGEST_GAP = 1.5


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 16, max_experts: int = 24) -> Case:
    """Draw counts of several kinds, a random layout (with duplicates) and a node size."""
    geometry, seed = draw(geometries(max_ranks, max_experts, 3)), draw(st.integers(0, 2**16))
    layout = ExpertLayout.random(*geometry.shape, seed=(seed,))
    layout = with_holes(layout, (seed % 3) / 2, seed)
    return counts_of(draw(st.sampled_from(KINDS)), geometry, seed), layout, geometry.node_size


@pytest.mark.parametrize("split", list(Split))
@settings(max_examples=150)
@given(cases())
def test_rows_columns_and_totals_of_a_split_equal_its_definition(split: Split, case: Case) -> None:
    counts_NE, layout, node_size = case
    num_ranks = layout.num_ranks
    quotas = solve_quotas(split, counts_NE, layout, node_size)
    expected_NS = quota_NS(counts_NE, layout, node_size)
    if split == Split.EXACT:
        expected_NS = exact_quota_NS(counts_NE, quotas.loads_S, layout, node_size)
    expected_NNC = expected_NS.reshape(num_ranks, num_ranks, layout.capacity)
    for rank in range(num_ranks):
        np.testing.assert_array_equal(quotas.rank_row(rank), expected_NS[rank])
        np.testing.assert_array_equal(quotas.rank_columns(rank), expected_NNC[:, rank, :])
    held_SE = layout.slot_expert_S[:, None] == np.arange(layout.num_experts)
    np.testing.assert_array_equal(expected_NS @ held_SE, counts_NE)
    np.testing.assert_array_equal(quotas.loads_S, expected_NS.sum(axis=0))
    np.testing.assert_array_equal(fsep_tokens_N(quotas), expected_NNC.sum(axis=(0, 2)))
    # Totals are made without the matrix.
    totals = quotas.totals()
    node_N = np.arange(num_ranks) // node_size
    near_NN = node_N[:, None] == node_N
    near_NS = near_NN.repeat(layout.capacity, axis=1)
    sent_NN = expected_NNC.sum(axis=2)
    np.testing.assert_array_equal(totals.near_S, np.where(near_NS, expected_NS, 0).sum(axis=0))
    np.testing.assert_array_equal(totals.far_S, np.where(near_NS, 0, expected_NS).sum(axis=0))
    np.testing.assert_array_equal(totals.sent_near_N, np.where(near_NN, sent_NN, 0).sum(axis=1))
    np.testing.assert_array_equal(totals.sent_far_N, np.where(near_NN, 0, sent_NN).sum(axis=1))
    np.testing.assert_array_equal(totals.own_N, np.diagonal(sent_NN))


@pytest.mark.parametrize("split", list(Split))
def test_wrong_arguments_are_quoted(split: Split) -> None:
    layout, counts_NE = ExpertLayout.static(4, 2, 4), np.zeros((4, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected .* \(4, 4\)"):
        solve_quotas(split, counts_NE[:, :3], layout, 2).totals()
    with pytest.raises(ValueError, match=r"node size 3 does not divide the 4 ranks; .*\[1, 2, 4\]"):
        solve_quotas(split, counts_NE, layout, 3)
    quotas = solve_quotas(split, counts_NE, layout, 2)
    for wrong in (4, -1):
        for ask in (quotas.rank_row, quotas.rank_columns):
            with pytest.raises(ValueError, match=rf"rank must be in 0\.\.3, got {wrong}"):
                ask(wrong)


SHAPES = [(4, 2), (6, 3), (8, 4), (12, 4), (16, 8), (5, 5), (8, 1), (1, 1)]


def test_load_and_tokens_off_the_node_are_optimal_by_linear_programs() -> None:
    gaps = []
    for seed in range(224):
        rng = np.random.default_rng(seed)
        num_ranks, node_size = SHAPES[seed % len(SHAPES)]
        num_experts = int(rng.integers(2, 17))
        capacity = min(num_experts, -(-num_experts // num_ranks) + seed // 8 % 4)
        geometry = Geometry(num_ranks, num_experts, capacity, node_size)
        layout = with_holes(geometry.random_layout((seed,)), (seed % 5 == 4) / 2, seed)
        counts_NE = counts_of(KINDS[seed % len(KINDS)], geometry, seed)
        quotas = exact_split(layout, node_size).solve(counts_NE)
        quota_NS = np.stack([quotas.rank_row(rank) for rank in range(num_ranks)])
        program = TransportProgram(counts_NE, layout, node_size)

        # The integer optimum is the rounded fractional one, as capacities of flows are integers.
        least = int(np.ceil(program.least(None) - 1e-6))
        assert quotas.rank_loads_N().max() == least
        off_node = off_node_tokens(quota_NS, layout, node_size)
        assert off_node == round(program.least(program.off_node_A, least))
        off_rank = off_rank_tokens(quota_NS, layout)
        least_off_rank = program.least(program.off_rank_A, least, off_node)
        if node_size in (1, num_ranks):
            assert off_rank == round(least_off_rank)
            continue
        assert off_rank >= round(least_off_rank)
        if least_off_rank > 20:
            gaps.append(off_rank / least_off_rank)
    assert len(gaps) > 40
    assert np.mean(gaps) <= OFF_RANK_MEAN_GAP
    assert max(gaps) <= OFF_RANK_LARGEST_GAP


class TransportProgram:
    """Linear programs over all splits of a case: tokens from (source, expert) to slots."""

    def __init__(self, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> None:
        held_SE = layout.slot_expert_S[:, None] == np.arange(layout.num_experts)
        source_A, slot_A, expert_A = np.nonzero(held_SE & (counts_NE > 0)[:, None])
        rank_A = slot_A // layout.capacity
        self.off_node_A = (source_A // node_size != rank_A // node_size).astype(float)
        self.off_rank_A = (source_A != rank_A).astype(float)
        rows, row_A = np.unique(source_A * layout.num_experts + expert_A, return_inverse=True)
        self.supply = counts_NE.reshape(-1)[rows]
        self.of_row = (np.arange(len(rows))[:, None] == row_A).astype(float)
        self.of_rank = (np.arange(layout.num_ranks)[:, None] == rank_A).astype(float)

    def least(
        self, cost_A: npt.NDArray[np.float64] | None, cap: int = 0, off_node: int | None = None
    ) -> float:
        """Return the least cost at this largest load; without costs, the least largest load."""
        optimize = pytest.importorskip("scipy.optimize")
        equal, upper, limit = self.of_row, self.of_rank, np.full(len(self.of_rank), float(cap))
        if not upper.size:
            return 0.0
        if cost_A is None:  # the largest load is one more variable
            cost_A = np.append(np.zeros(upper.shape[1]), 1.0)
            equal = np.pad(equal, ((0, 0), (0, 1)))
            upper = np.pad(upper, ((0, 0), (0, 1)), constant_values=-1.0)
        if off_node is not None:
            upper, limit = np.vstack([upper, self.off_node_A]), np.append(limit, off_node)
        result = optimize.linprog(cost_A, upper, limit, equal, self.supply, method="highs")
        assert result.status == 0, result.message
        return float(result.fun)


def test_stock_ranks_own_consecutive_experts_and_balance_is_max_over_mean() -> None:
    counts_NE = np.array([[1, 2, 3, 4], [10, 20, 30, 40]])
    assert stock_tokens_N(counts_NE).tolist() == [33, 77]
    assert max_over_mean(np.array([5, 5, 5])) == 1.0
    assert max_over_mean(np.array([0, 9, 0])) == 3.0
    assert max_over_mean(np.zeros(4, dtype=np.int64)) == 1.0
