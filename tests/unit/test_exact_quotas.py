"""Exact quotas are conserved, minimal by a linear program, and near an independent optimum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.planner.exact import ExactQuotas, exact_split
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split
from tests.oracles.exact import (
    exact_quota_NS,
    least_largest_load,
    off_node_tokens,
    off_rank_tokens,
)

Case = tuple[Int64, ExpertLayout, int]

# Bound of off-rank tokens over the optimum among splits with the fewest off-node tokens, for
# several nodes of several ranks; otherwise there is no gap. In 1,478 random cases with more than 20
# such tokens: mean 1.011, 99th percentile below 1.18, worst 1.47.
OFF_RANK_MEAN_GAP = 1.03
OFF_RANK_LARGEST_GAP = 1.5


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 16, max_experts: int = 24) -> Case:
    """Draw counts of several kinds, a random layout (with duplicates) and a node size."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    least = -(-num_experts // num_ranks)
    capacity = draw(st.integers(least, min(num_experts, least + 3)))
    node_size = draw(st.sampled_from([g for g in range(1, num_ranks + 1) if num_ranks % g == 0]))
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(["zero", "one token", "one expert", "few", "even", "zipf"]))
    layout = ExpertLayout.random(num_ranks, capacity, num_experts, seed=(seed,))
    return counts_of(kind, num_ranks, num_experts, seed), layout, node_size


def counts_of(kind: str, num_ranks: int, num_experts: int, seed: int) -> Int64:
    rng = np.random.default_rng(seed)
    counts_NE = np.zeros((num_ranks, num_experts), dtype=np.int64)
    if kind == "one token":
        counts_NE[seed % num_ranks, seed % num_experts] = 1
    elif kind == "one expert":
        counts_NE[:, seed % num_experts] = rng.integers(0, 100, num_ranks)
    elif kind == "few":
        counts_NE = rng.integers(0, 3, counts_NE.shape)
    elif kind == "even":
        counts_NE = rng.integers(0, 1000, counts_NE.shape)
    elif kind == "zipf":
        share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1) ** 1.2)
        counts_NE = rng.multinomial(500, share_E / share_E.sum(), size=num_ranks)
    return counts_NE.astype(np.int64)


def rows_NS(quotas: ExactQuotas) -> Int64:
    return np.stack([quotas.rank_row(rank) for rank in range(quotas.layout.num_ranks)])


@settings(max_examples=150)
@given(cases())
def test_rows_columns_and_totals_equal_the_looped_reference(case: Case) -> None:
    counts_NE, layout, node_size = case
    split = exact_split(layout, node_size)
    quotas = split.solve(counts_NE)
    expected_NS = exact_quota_NS(counts_NE, quotas.loads_S, layout, node_size)
    expected_NNC = expected_NS.reshape(layout.num_ranks, layout.num_ranks, layout.capacity)

    np.testing.assert_array_equal(rows_NS(quotas), expected_NS)
    for rank in range(layout.num_ranks):
        np.testing.assert_array_equal(quotas.rank_columns(rank), expected_NNC[:, rank, :])
    np.testing.assert_array_equal(quotas.loads_S, expected_NS.sum(axis=0))

    totals = split.totals(counts_NE)
    node_N = np.arange(layout.num_ranks) // node_size
    near_NN = node_N[:, None] == node_N
    near_NS = near_NN.repeat(layout.capacity, axis=1)
    sent_NN = expected_NNC.sum(axis=2)
    np.testing.assert_array_equal(totals.near_S, np.where(near_NS, expected_NS, 0).sum(axis=0))
    np.testing.assert_array_equal(totals.far_S, np.where(near_NS, 0, expected_NS).sum(axis=0))
    np.testing.assert_array_equal(totals.sent_near_N, np.where(near_NN, sent_NN, 0).sum(axis=1))
    np.testing.assert_array_equal(totals.sent_far_N, np.where(near_NN, 0, sent_NN).sum(axis=1))
    np.testing.assert_array_equal(totals.own_N, np.diagonal(sent_NN))


@settings(max_examples=100)
@given(cases(max_ranks=40, max_experts=64))
def test_quotas_conserve_every_token(case: Case) -> None:
    counts_NE, layout, node_size = case
    quota = rows_NS(exact_split(layout, node_size).solve(counts_NE))
    by_expert_NE = np.zeros_like(counts_NE)
    for slot, expert in enumerate(layout.to_list()):
        by_expert_NE[:, expert] += quota[:, slot]
    np.testing.assert_array_equal(by_expert_NE, counts_NE)
    assert quota.min() >= 0


@settings(max_examples=100)
@given(cases(max_ranks=8, max_experts=8))
def test_the_largest_load_meets_the_bound_over_all_sets_of_experts(case: Case) -> None:
    counts_NE, layout, node_size = case
    quotas = exact_split(layout, node_size).solve(counts_NE)
    assert quotas.rank_loads_N().max() == least_largest_load(counts_NE, layout)


@settings(max_examples=120)
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
        counts_NE = counts_of(["few", "even", "zipf"][seed % 3], num_ranks, num_experts, seed)
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


@settings(max_examples=100)
@given(cases(max_ranks=40, max_experts=64))
def test_no_rank_carries_more_than_under_the_even_split(case: Case) -> None:
    counts_NE, layout, node_size = case
    even_N = even_split(layout, node_size).slot_loads(counts_NE).reshape(layout.num_ranks, -1)
    exact_N = exact_split(layout, node_size).solve(counts_NE).rank_loads_N()
    assert exact_N.max() <= even_N.sum(axis=1).max()


def test_a_duplicate_on_one_rank_is_left_empty() -> None:
    layout = ExpertLayout.from_slots(2, 2, 2, [0, 0, 0, 1])
    counts_NE = np.array([[6, 0], [2, 4]])
    assert exact_split(layout, 2).solve(counts_NE).loads_S.tolist() == [6, 0, 2, 4]


def test_load_flows_through_ranks_that_do_not_share_an_expert_with_the_hot_one() -> None:
    # A chain of ranks, each sharing an expert with the next; all tokens enter at one end.
    layout = ExpertLayout.from_slots(4, 2, 5, [0, 1, 1, 2, 2, 3, 3, 4])
    counts_NE = np.zeros((4, 5), dtype=np.int64)
    counts_NE[0] = [10, 30, 0, 0, 0]
    counts_NE[3] = [0, 0, 10, 10, 20]
    loads_N = exact_split(layout, 4).solve(counts_NE).rank_loads_N()
    assert loads_N.tolist() == [20, 20, 20, 20]


def test_wrong_arguments_are_quoted() -> None:
    layout = ExpertLayout.static(4, 2, 4)
    split = exact_split(layout, 2)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected .* \(4, 4\)"):
        split.solve(np.zeros((4, 3), dtype=np.int64))
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.3, got 4"):
        split.solve(np.zeros((4, 4), dtype=np.int64)).rank_row(4)
    negative_NE = np.zeros((4, 4), dtype=np.int64)
    negative_NE[1, 2] = -1
    with pytest.raises(ValueError, match=r"counts_NE holds -1 at rank 1, expert 2"):
        split.solve(negative_NE)
    with pytest.raises(ValueError, match="node size 3 does not divide"):
        exact_split(layout, 3)


class TransportProgram:
    """Linear programs over all splits of a case: tokens from (source, expert) to slots."""

    def __init__(self, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> None:
        slots = layout.to_list()
        self.num_ranks = layout.num_ranks
        arcs = [
            (source, slot, expert)
            for source in range(layout.num_ranks)
            for slot, expert in enumerate(slots)
            if counts_NE[source, expert] > 0
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
        result = optimize.linprog(
            cost,
            A_ub=sparse.csr_array(upper),
            b_ub=limit,
            A_eq=equal,
            b_eq=self.supply,
            method="highs",
        )
        assert result.status == 0, result.message
        return float(result.fun)
