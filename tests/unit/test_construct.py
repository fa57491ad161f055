"""Fresh layouts: perfect balance for any counts, and locality."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.planner.construct import always_balances, construct_layout
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from tests.unit.planner_cases import KINDS, counts_of, geometries, static


def largest_load(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> int:
    return int(exact_split(layout, node_size).solve(counts_NE).rank_loads_N().max())


def off_node_share(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> float:
    far_S = exact_split(layout, node_size).solve(counts_NE).totals().far_S
    return float(far_S.sum()) / max(int(counts_NE.sum()), 1)


def least_load(counts_NE: Int64) -> int:
    return int(-(-counts_NE.sum() // counts_NE.shape[0]))


@settings(max_examples=200)
@given(geometries(40, 64, balances=True), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_no_rank_carries_more_than_its_share_or_an_expert_twice(
    geometry: Geometry, kind: str, seed: int
) -> None:
    assert always_balances(geometry)
    counts_NE, node_size = counts_of(kind, geometry, seed), geometry.node_size
    layout = construct_layout(counts_NE, static(geometry), node_size)
    geometry.check_layout(layout)
    assert largest_load(counts_NE, layout, node_size) == least_load(counts_NE)
    for rank in range(geometry.num_ranks):
        assert len(set(layout.experts_of(rank))) == geometry.capacity
    assert construct_layout(counts_NE, static(geometry), node_size) == layout
    assert construct_layout(counts_NE, layout, node_size) is layout


@settings(max_examples=150)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**16))
def test_no_token_leaves_its_node_where_a_node_can_balance_itself(
    num_nodes: int, node_size: int, num_experts: int, seed: int
) -> None:
    capacity = min(num_experts, -(-num_experts // node_size) + 1)
    geometry = Geometry(num_nodes * node_size, num_experts, capacity, node_size)
    # Every rank has the same number of tokens, without a convenient divisor.
    counts_NE = counts_of("zipf", geometry, seed)
    layout = construct_layout(counts_NE, static(geometry), node_size)
    assert off_node_share(counts_NE, layout, node_size) == 0
    assert largest_load(counts_NE, layout, node_size) == least_load(counts_NE)


@settings(max_examples=150)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**16))
def test_with_fewer_slots_the_layout_is_still_legal(
    num_ranks: int, num_experts: int, seed: int
) -> None:
    capacity = -(-num_experts // num_ranks)
    geometry = Geometry(num_ranks, num_experts, capacity, 1)
    layout = construct_layout(counts_of("zipf", geometry, seed), static(geometry), 1)
    geometry.check_layout(layout)


def test_wrong_arguments_are_quoted() -> None:
    current = ExpertLayout.static(4, 2, 4)
    negative_NE = np.zeros((4, 4), dtype=np.int64)
    negative_NE[1, 2] = -1
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected .* \(4, 4\)"):
        construct_layout(np.zeros((4, 3), dtype=np.int64), current, 2)
    with pytest.raises(ValueError, match=r"counts_NE holds -1 at rank 1, expert 2"):
        construct_layout(negative_NE, current, 2)
    with pytest.raises(ValueError, match="node size 3 does not divide"):
        construct_layout(np.zeros((4, 4), dtype=np.int64), current, 3)
