"""Layouts of home experts: the native code with empty slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.layer.dispatch.permutation import run_sizes
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.splits import RankQuotas
from tests.oracles import planner as reference
from tests.oracles.exact import exact_quota_NS, least_largest_load
from tests.unit.planner_cases import KINDS, counts_of


@st.composite
def home_geometries(draw: st.DrawFn, most_experts: int = 24) -> Geometry:
    num_ranks, node_size = draw(st.sampled_from([(2, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4)]))
    home = draw(st.integers(1, max(most_experts // num_ranks, 1)))
    capacity = min(num_ranks * home, home + draw(st.integers(1, 3)))
    return Geometry(num_ranks, num_ranks * home, capacity, node_size, Sharding.EXPERTS)


def random_replicas(geometry: Geometry, seed: int) -> ExpertLayout:
    """Fill about half of the replica slots at random."""
    rng = np.random.default_rng(seed)
    slots_NC = geometry.static_layout.slot_expert_S.reshape(geometry.num_ranks, -1).copy()
    home, experts = geometry.home_slots, np.arange(geometry.num_experts)
    for rank in range(geometry.num_ranks):
        others = rng.permutation(experts[experts // home != rank])
        chosen = others[: rng.integers(0, geometry.capacity - home + 1)]
        slots_NC[rank, home : home + len(chosen)] = np.sort(chosen)
    layout = ExpertLayout.from_slots(*geometry.shape, slots_NC.reshape(-1))
    geometry.check_layout(layout)
    return layout


@settings(max_examples=100)
@given(home_geometries(8), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_quotas_with_empty_slots_are_exact_and_leave_these_empty(
    geometry: Geometry, kind: str, seed: int
) -> None:
    counts_NE: Int64 = counts_of(kind, geometry, seed)
    layout, node_size = random_replicas(geometry, seed), geometry.node_size
    quotas = exact_split(layout, node_size).solve(counts_NE)
    empty_S = layout.slot_expert_S == EMPTY
    assert not quotas.loads_S[empty_S].any()
    assert quotas.rank_loads_N().max() == least_largest_load(counts_NE, layout)
    expected_NS = exact_quota_NS(counts_NE, quotas.loads_S, layout, node_size)
    totals = quotas.totals()
    np.testing.assert_array_equal(totals.near_S + totals.far_S, quotas.loads_S)
    assert totals.sent_near_N.sum() + totals.sent_far_N.sum() == counts_NE.sum()
    for rank in range(geometry.num_ranks):
        mine = slice(rank * geometry.capacity, (rank + 1) * geometry.capacity)
        np.testing.assert_array_equal(quotas.rank_row(rank), expected_NS[rank])
        np.testing.assert_array_equal(quotas.rank_columns(rank), expected_NS[:, mine])


@settings(max_examples=100)
@given(home_geometries(), st.integers(0, 2**16))
def test_runs_of_rows_with_empty_slots_equal_their_definition(
    geometry: Geometry, seed: int
) -> None:
    layout = random_replicas(geometry, seed)
    rng = np.random.default_rng(seed)
    row_S = rng.integers(0, 5, geometry.num_slots) * (layout.slot_expert_S != EMPTY)
    columns_NC = rng.integers(0, 5, (geometry.num_ranks, geometry.capacity))
    columns_NC *= layout.slot_expert_S.reshape(geometry.num_ranks, -1)[0] != EMPTY
    runs = RankQuotas.of(layout, row_S, columns_NC).runs
    expected = reference.token_runs(layout, row_S, columns_NC)
    parts = np.split(runs, np.cumsum(run_sizes(geometry.num_slots, geometry.num_experts))[:-1])
    for (name, wanted), found in zip(expected.items(), parts, strict=True):
        assert found.tolist() == wanted, name


def test_empty_slots_are_refused_where_experts_have_no_home() -> None:
    layout = ExpertLayout.at_home(2, 2, 2)
    with pytest.raises(ValueError, match="only --fsep-sharding experts"):
        Geometry(2, 2, 2, 2).check_layout(layout)
