"""The even split equals its looped definition, is conserved, and stays inside nodes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.quotas import even_split
from tests.oracles.planner import quota_NS
from tests.unit.planner_cases import with_holes

Case = tuple[Int64, ExpertLayout, int]


def random_case(
    num_ranks: int, capacity: int, num_experts: int, node_size: int, top: int, seed: int
) -> Case:
    layout = ExpertLayout.random(num_ranks, capacity, num_experts, seed=(seed,))
    layout = with_holes(layout, (seed % 3) / 2, seed)
    rng = np.random.default_rng(seed)
    return rng.integers(0, top + 1, (num_ranks, num_experts)), layout, node_size


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 40, max_experts: int = 64) -> Case:
    """Draw counts, a random layout and a node size, for any N, C, E and G."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    # From few slots, where nodes lack experts, to many.
    least = -(-num_experts // num_ranks)
    capacity = draw(st.integers(least, min(num_experts, least + 4)))
    node_size = draw(st.sampled_from([g for g in range(1, num_ranks + 1) if num_ranks % g == 0]))
    top = draw(st.sampled_from([0, 1, 5, 1000]))
    seed = draw(st.integers(0, 2**16))
    return random_case(num_ranks, capacity, num_experts, node_size, top, seed)


def rows_NS(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Int64:
    split = even_split(layout, node_size)
    return np.stack([split.rank_row(counts_NE, rank) for rank in range(layout.num_ranks)])


@settings(max_examples=60)
@given(cases(max_ranks=16, max_experts=24))
def test_rows_columns_and_loads_equal_the_looped_reference(case: Case) -> None:
    counts_NE, layout, node_size = case
    split = even_split(layout, node_size)
    expected_NS = quota_NS(counts_NE, layout, node_size)
    expected_NNC = expected_NS.reshape(layout.num_ranks, layout.num_ranks, layout.capacity)

    np.testing.assert_array_equal(rows_NS(*case), expected_NS)
    for rank in range(layout.num_ranks):
        np.testing.assert_array_equal(split.rank_columns(counts_NE, rank), expected_NNC[:, rank, :])
    np.testing.assert_array_equal(split.slot_loads(counts_NE), expected_NS.sum(axis=0))

    totals = split.totals(counts_NE)
    sent_NN = expected_NNC.sum(axis=2)
    node_N = np.arange(layout.num_ranks) // node_size
    near_NN = node_N[:, None] == node_N
    near_NS = near_NN.repeat(layout.capacity, axis=1)
    np.testing.assert_array_equal(totals.near_S, np.where(near_NS, expected_NS, 0).sum(axis=0))
    np.testing.assert_array_equal(totals.far_S, np.where(near_NS, 0, expected_NS).sum(axis=0))
    np.testing.assert_array_equal(totals.sent_near_N, np.where(near_NN, sent_NN, 0).sum(axis=1))
    np.testing.assert_array_equal(totals.sent_far_N, np.where(near_NN, 0, sent_NN).sum(axis=1))
    np.testing.assert_array_equal(totals.own_N, np.diagonal(sent_NN))


@settings(max_examples=80)
@given(cases())
def test_quotas_conserve_every_token(case: Case) -> None:
    counts_NE, layout, node_size = case
    quota = rows_NS(*case)
    by_expert_NE = np.zeros_like(counts_NE)
    filled_S = layout.slot_expert_S != EMPTY
    assert not quota[:, ~filled_S].any()
    for slot, expert in enumerate(layout.to_list()):
        if expert == EMPTY:
            continue
        by_expert_NE[:, expert] += quota[:, slot]
    np.testing.assert_array_equal(by_expert_NE, counts_NE)
    assert quota.min() >= 0
    split = even_split(layout, node_size)
    np.testing.assert_array_equal(quota.sum(axis=0), split.slot_loads(counts_NE))
    columns = [split.rank_columns(counts_NE, rank) for rank in range(layout.num_ranks)]
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), quota)


@settings(max_examples=60)
@given(cases())
def test_tokens_stay_in_a_node_that_has_the_expert(case: Case) -> None:
    _, layout, node_size = case
    quota = rows_NS(*case)
    slot_node_S = np.arange(layout.num_slots) // (layout.capacity * node_size)
    for source in range(layout.num_ranks):
        in_node_S = slot_node_S == source // node_size
        held_here = set(layout.slot_expert_S[in_node_S].tolist())
        sent_away = set(layout.slot_expert_S[(quota[source] > 0) & ~in_node_S].tolist())
        assert not held_here & sent_away


@settings(max_examples=60)
@given(cases())
def test_replicas_that_share_differ_by_at_most_one_token(case: Case) -> None:
    _, layout, node_size = case
    slot_node_S = np.arange(layout.num_slots) // (layout.capacity * node_size)
    for source, row_S in enumerate(rows_NS(*case)):
        for expert in range(layout.num_experts):
            held_S = layout.slot_expert_S == expert
            near_S = held_S & (slot_node_S == source // node_size)
            shared = row_S[near_S if near_S.any() else held_S]
            assert shared.max() - shared.min() <= 1


def test_remainders_of_different_sources_go_to_different_replicas() -> None:
    layout = ExpertLayout.from_slots(4, 1, 1, [0, 0, 0, 0])
    counts_NE = np.ones((4, 1), dtype=np.int64)
    assert even_split(layout, 4).slot_loads(counts_NE).tolist() == [1, 1, 1, 1]


def test_one_node_shares_among_its_own_replicas_only() -> None:
    # Ranks 0, 1 and 2, 3 are nodes; expert 0 is on both, expert 1 on the second only.
    layout = ExpertLayout.from_slots(4, 1, 2, [0, 0, 0, 1])
    counts_NE = np.array([[10, 4], [0, 0], [0, 0], [6, 0]], dtype=np.int64)
    split = even_split(layout, 2)
    assert split.rank_row(counts_NE, 0).tolist() == [5, 5, 0, 4]
    assert split.rank_row(counts_NE, 3).tolist() == [0, 0, 6, 0]
    assert split.rank_columns(counts_NE, 2).tolist() == [[0], [0], [0], [6]]


def test_tables_are_cached_by_content() -> None:
    first = ExpertLayout.from_slots(4, 1, 2, [0, 0, 1, 1])
    again = ExpertLayout.from_slots(4, 1, 2, [0, 0, 1, 1])
    assert even_split(first, 2) is even_split(again, 2)
    assert even_split(first, 2) is not even_split(first, 4)


def test_wrong_arguments_are_quoted() -> None:
    layout = ExpertLayout.static(4, 2, 4)
    counts_NE = np.zeros((4, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"node size 3 does not divide the 4 ranks; .*\[1, 2, 4\]"):
        even_split(layout, 3)
    with pytest.raises(ValueError, match="node size 0"):
        quota_NS(counts_NE, layout, 0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.3, got 4"):
        even_split(layout, 2).rank_row(counts_NE, 4)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.3, got -1"):
        even_split(layout, 2).rank_columns(counts_NE, -1)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected .* \(4, 4\)"):
        even_split(layout, 2).slot_loads(counts_NE[:, :3])
