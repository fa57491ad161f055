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
from megatron_laer.planner.exact import ExactQuotas, exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
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


def rows_NS(quotas: ExactQuotas) -> Int64:
    return np.stack([quotas.rank_row(rank) for rank in range(quotas.layout.num_ranks)])


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


@settings(max_examples=60)
@given(cases(max_ranks=16, max_experts=16))
def test_load_and_tokens_off_the_node_are_optimal_by_linear_programs(case: Case) -> None:
    counts_NE, layout, node_size = case
    quotas = exact_split(layout, node_size).solve(counts_NE)
    quota_NS = rows_NS(quotas)
    program = TransportProgram(counts_NE, layout, node_size)

    # The integer optimum is the rounded fractional one, since capacities of the flow are integers.
    least = int(np.ceil(program.least_largest_load() - 1e-6))
    assert quotas.rank_loads_N().max() == least
    off_node = off_node_tokens(quota_NS, layout, node_size)
    assert off_node == round(program.least_off_node(least))
    off_rank = off_rank_tokens(quota_NS, layout)
    least_off_rank = program.least_off_rank(least, off_node)
    if node_size in (1, layout.num_ranks):
        assert off_rank == round(least_off_rank)
    else:
        assert off_rank >= round(least_off_rank)


def test_tokens_off_their_rank_are_within_the_stated_gap() -> None:
    gaps = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        num_ranks, node_size = [(4, 2), (6, 3), (8, 4), (12, 4), (16, 8)][seed % 5]
        num_experts = int(rng.integers(2, 17))
        least_capacity = -(-num_experts // num_ranks)
        capacity = min(num_experts, least_capacity + seed % 4)
        layout = ExpertLayout.random(num_ranks, capacity, num_experts, seed=(seed,))
        geometry = Geometry(num_ranks, num_experts, capacity, node_size)
        counts_NE = counts_of(["few", "even", "zipf"][seed % 3], geometry, seed)
        quotas = exact_split(layout, node_size).solve(counts_NE)
        quota_NS = rows_NS(quotas)
        least = TransportProgram(counts_NE, layout, node_size).least_off_rank(
            int(quotas.rank_loads_N().max()), off_node_tokens(quota_NS, layout, node_size)
        )
        if least > 20:
            gaps.append(off_rank_tokens(quota_NS, layout) / least)
    assert len(gaps) > 80
    assert np.mean(gaps) <= OFF_RANK_MEAN_GAP
    assert max(gaps) <= OFF_RANK_LARGEST_GAP


class TransportProgram:
    """Linear programs over all splits of a case: tokens from (source, expert) to slots."""

    def __init__(self, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> None:
        slots = layout.to_list()
        self.num_ranks = layout.num_ranks
        arcs = [
            (source, slot, expert)
            for source in range(layout.num_ranks)
            for slot, expert in enumerate(slots)
            if expert != EMPTY and counts_NE[source, expert] > 0
        ]
        self.num_arcs = len(arcs)
        source_A = np.array([arc[0] for arc in arcs], dtype=np.int64)
        rank_A = np.array([arc[1] // layout.capacity for arc in arcs], dtype=np.int64)
        expert_A = np.array([arc[2] for arc in arcs], dtype=np.int64)
        self.off_node_A = (source_A // node_size != rank_A // node_size).astype(float)
        self.off_rank_A = (source_A != rank_A).astype(float)
        rows, self.row_A = np.unique(source_A * layout.num_experts + expert_A, return_inverse=True)
        self.supply = counts_NE.reshape(-1)[rows].astype(float)
        self.rank_A = rank_A

    def least_largest_load(self) -> float:
        return self._solve(np.zeros(self.num_arcs), None, None)

    def least_off_node(self, cap: int) -> float:
        return self._solve(self.off_node_A, cap, None)

    def least_off_rank(self, cap: int, off_node: int) -> float:
        return self._solve(self.off_rank_A, cap, off_node)

    def _solve(
        self, cost_A: npt.NDArray[np.float64], cap: int | None, off_node: int | None
    ) -> float:
        optimize = pytest.importorskip("scipy.optimize")
        sparse = pytest.importorskip("scipy.sparse")
        if self.num_arcs == 0:
            return 0.0
        arcs = np.arange(self.num_arcs)
        ones = np.ones(self.num_arcs)
        # Without a given cap, the largest load is one more variable.
        size = self.num_arcs + (cap is None)
        equal = sparse.csr_array((ones, (self.row_A, arcs)), shape=(self.supply.size, size))
        upper = sparse.csr_array((ones, (self.rank_A, arcs)), shape=(self.num_ranks, size)).tolil()
        limit = np.full(self.num_ranks, 0.0 if cap is None else float(cap))
        cost = np.zeros(size)
        cost[: self.num_arcs] = cost_A
        if cap is None:
            upper[:, -1] = -1.0
            cost[-1] = 1.0
        if off_node is not None:
            row = sparse.csr_array(self.off_node_A.reshape(1, -1))
            upper = sparse.vstack([upper, row])
            limit = np.append(limit, float(off_node))
        upper = sparse.csr_array(upper)
        result = optimize.linprog(cost, upper, limit, equal, self.supply, method="highs")
        assert result.status == 0, result.message
        return float(result.fun)


def test_stock_ranks_own_consecutive_experts_and_balance_is_max_over_mean() -> None:
    counts_NE = np.array([[1, 2, 3, 4], [10, 20, 30, 40]])
    assert stock_tokens_N(counts_NE).tolist() == [33, 77]
    assert max_over_mean(np.array([5, 5, 5])) == 1.0
    assert max_over_mean(np.array([0, 9, 0])) == 3.0
    assert max_over_mean(np.zeros(4, dtype=np.int64)) == 1.0
