"""Layouts of home experts: replicas that balance and pay, and quotas with empty slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, PlanMode, Sharding
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.home import Replication, replicate
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.placed import Placed
from tests.costs import FREE, make_costs
from tests.oracles.home_layouts import least_of_all, replicas
from tests.unit.planner_cases import KINDS, counts_of, home_geometries


def replicas_of(made: Replication) -> list[dict[int, int]]:
    """Return the tokens of each rank's replicas by expert."""
    home = made.layout.num_experts // made.layout.num_ranks
    slots_NC, loads_NC = (
        of_S.reshape(made.layout.num_ranks, -1)[:, home:].tolist()
        for of_S in (made.layout.slot_expert_S, made.loads_S)
    )
    return [
        {expert: load for expert, load in zip(*of_rank, strict=True) if expert != EMPTY}
        for of_rank in zip(slots_NC, loads_NC, strict=True)
    ]


@settings(max_examples=100)
@given(home_geometries(48), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_a_forecasts_experts_have_an_eighth_more_and_at_most_that_of_a_ranks_share(
    geometry: Geometry, kind: str, seed: int
) -> None:
    """Without costs, their replicas are those of the raised forecast."""
    counts_NE = counts_of(kind, geometry, seed) * 1000
    load_E = counts_NE.sum(axis=0)
    room_E = np.minimum(load_E, load_E.sum() // geometry.num_ranks) // 8
    raised_NE = np.zeros_like(counts_NE)
    node_QE = counts_NE.reshape(geometry.num_nodes, -1, geometry.num_experts).sum(axis=1)
    raised_NE[:: geometry.node_size] = node_QE + node_QE * room_E // np.maximum(load_E, 1)
    layout = GreedyStrategy(geometry).plan(counts_NE, geometry.static_layout)
    for rank, of_rank in enumerate(replicas(raised_NE, geometry, 0)):
        filled = {*layout.experts_of(rank)[geometry.home_slots :]} - {EMPTY}
        assert filled == of_rank.keys()


@settings(max_examples=150)
@given(home_geometries(48), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_replicas_are_legal_and_never_above_stock(geometry: Geometry, kind: str, seed: int) -> None:
    counts_NE = counts_of(kind, geometry, seed)
    made = replicate(counts_NE, geometry)
    geometry.check_layout(made.layout)
    loads_NC = made.loads_S.reshape(geometry.num_ranks, -1)
    slots_NC = made.layout.slot_expert_S.reshape(geometry.num_ranks, -1)
    for experts in slots_NC[:, geometry.home_slots :].tolist():
        filled = [expert for expert in experts if expert != EMPTY]
        assert experts == sorted(filled) + [EMPTY] * (len(experts) - len(filled))
    # The loads are a split of the counts, and every replica has a purpose.
    filled_S = made.layout.slot_expert_S != EMPTY
    given_E = np.bincount(
        made.layout.slot_expert_S[filled_S],
        weights=made.loads_S[filled_S],
        minlength=geometry.num_experts,
    )
    np.testing.assert_array_equal(given_E, counts_NE.sum(axis=0))
    assert not loads_NC[slots_NC == EMPTY].any()
    assert (loads_NC[:, geometry.home_slots :] > 0).sum() == (
        slots_NC[:, geometry.home_slots :] != EMPTY
    ).sum()

    ideal = -(-int(counts_NE.sum()) // geometry.num_ranks)
    stock_N = counts_NE.sum(axis=0).reshape(geometry.num_ranks, -1).sum(axis=1)
    largest = int(loads_NC.sum(axis=1).max())
    assert ideal <= largest <= max(ideal, int(stock_N.max()))
    assert made.is_ideal == (largest == ideal)
    if stock_N.max() <= ideal:
        assert made.layout == geometry.static_layout
    if geometry.home_slots == 1:
        assert made.is_ideal
    level = (ideal + int(stock_N.max())) // 2
    fewer = replicate(counts_NE, geometry, level)
    geometry.check_layout(fewer.layout)
    for found, of_level in ((made, 0), (fewer, level)):
        assert replicas_of(found) == replicas(counts_NE, geometry, of_level)
    # A level that every rank keeps needs no replica; one between may need more than the ideal.
    assert replicate(counts_NE, geometry, int(stock_N.max())).layout == geometry.static_layout
    if made.is_ideal and geometry.home_slots == 1:
        assert fewer.loads_S.reshape(geometry.num_ranks, -1).sum(axis=1).max() <= max(level, ideal)


def test_an_expert_that_just_fills_the_room_is_taken_from_the_most_loaded_rank() -> None:
    geometry = Geometry(3, 9, 4, 3, Sharding.EXPERTS)
    counts_NE = np.array([[10, 0, 0, 8, 8, 8, 20, 0, 0], [0] * 9, [0] * 9])
    found = replicas_of(replicate(counts_NE, geometry))
    assert found == [{3: 8}, {6: 2}, {}] == replicas(counts_NE, geometry, 0)


@pytest.mark.parametrize(("num_ranks", "home"), [(2, 2), (2, 4), (3, 2), (4, 1), (4, 2)])
def test_replicas_of_small_cases_are_nearly_always_the_best(num_ranks: int, home: int) -> None:
    num_experts = num_ranks * home
    geometry = Geometry(num_ranks, num_experts, home + 1, num_ranks, Sharding.EXPERTS)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        share_E = rng.lognormal(0, rng.choice([0.3, 0.6, 1.0, 1.5]), num_experts)
        counts_NE = rng.multinomial(600, share_E / share_E.sum(), size=num_ranks)
        layout = replicate(counts_NE, geometry).layout
        loads_N = exact_split(layout, num_ranks).solve(counts_NE).rank_loads_N()
        ratios.append(loads_N.max() / least_of_all(counts_NE, geometry))
    assert np.mean(np.array(ratios) == 1.0) >= 0.7
    assert max(ratios) <= 1.25


COUNTS_NE = np.array([[300, 100, 100, 100]] * 4)


@pytest.mark.parametrize(("num_ranks", "node_size"), [(8, 8), (8, 4)])
def test_slots_are_filled_for_drift_if_that_pays(num_ranks: int, node_size: int) -> None:
    geometry = Geometry(num_ranks, 4 * num_ranks, 6, node_size, Sharding.EXPERTS)
    rng, stock = np.random.default_rng(0), geometry.static_layout
    free = make_costs(intra=FREE, inter=FREE, pairs_per_rank=32768)
    dear = make_costs(intra=Link(1e12, 1.0), inter=Link(1e12, 1.0), pairs_per_rank=32768)
    ratios, found = [], []
    for _ in range(20):
        share_E = rng.lognormal(0, 0.8, geometry.num_experts)
        drifted_E = share_E * rng.lognormal(0, 0.15, geometry.num_experts)
        forecast_NE, counts_NE = (
            np.tile(np.rint(32768 * of_E / of_E.sum()).astype(np.int64), (num_ranks, 1))
            for of_E in (share_E, drifted_E)
        )
        layouts = [GreedyStrategy(geometry, of).plan(forecast_NE, stock) for of in (free, dear)]
        found.append([int(layout.replicas_E.sum()) - geometry.num_experts for layout in layouts])
        loads_N = exact_split(layouts[0], node_size).solve(counts_NE).rank_loads_N()
        ratios.append(loads_N.max() / loads_N.mean())
    assert np.mean(ratios) < 1.005
    free_replicas, dear_replicas = np.mean(found, axis=0)
    assert free_replicas > 1.5 * num_ranks and dear_replicas == 0


@pytest.mark.parametrize(("ffn", "slots"), [(1536, (128, 128)), (14336, (1, 63))])
def test_large_experts_of_many_nodes_leave_slots_free(ffn: int, slots: tuple[int, int]) -> None:
    """Experts of Qwen3-235B and of Mixtral-8x7B on 8 nodes: the latter's exchange takes longer."""
    geometry = Geometry(64, 128, 4, 8, Sharding.EXPERTS)
    costs = CostModel(load_cluster("h100-8"), 4096, ffn, True, 2, pairs_per_rank=32768)
    counts_NE = lognormal_NE(geometry, 32768, 0.6)
    planner = GreedyStrategy(geometry, costs.with_exchange(Auto.AUTO, geometry))
    layout = planner.plan(counts_NE, geometry.static_layout)
    least, most = slots
    assert least <= layout.replicas_E.sum() - 128 <= most


def test_plans_also_fill_slots_for_their_node_alone() -> None:
    """With strong skew and many tokens, this is faster than slots that also count load."""
    geometry = Geometry(32, 128, 6, 8, Sharding.EXPERTS)
    costs = CostModel(load_cluster("h100-8"), 4096, 1536, True, 2, pairs_per_rank=65536)
    costs = costs.with_exchange(Auto.AUTO, geometry)
    counts_NE, stock = lognormal_NE(geometry, 65536, 2.0), geometry.static_layout
    planned = GreedyStrategy(geometry, costs).plan(counts_NE, stock)
    fresh = Guard(PlanMode.EXACT, costs, geometry).decide(counts_NE, stock).layout
    planned_s, fresh_s = (
        (layer_s := costs.layer_seconds(counts_NE, placed))
        + costs.exchanges_seconds(placed, layer_s)
        for placed in (Placed(planned, geometry), Placed(fresh, geometry))
    )
    assert planned_s < 0.97 * fresh_s


def lognormal_NE(geometry: Geometry, pairs: int, sigma: float) -> Int64:
    share_E = np.random.default_rng(0).lognormal(0, sigma, geometry.num_experts)
    counts_E = np.rint(pairs * share_E / share_E.sum()).astype(np.int64)
    return np.tile(counts_E, (geometry.num_ranks, 1))


def test_free_slots_bring_tokens_back_to_their_node() -> None:
    # Balanced, but each node wants the other's experts, and tokens between nodes are slow.
    geometry = Geometry(4, 4, 3, 2, Sharding.EXPERTS)
    counts_NE = np.array([[0, 0, 5000, 5000]] * 2 + [[5000, 5000, 0, 0]] * 2)
    costs = make_costs(intra=FREE, inter=Link(1e6, 0.0))
    cheap = make_costs(intra=FREE, inter=FREE)
    for prices, is_filled in ((costs, True), (cheap, False)):
        guard = Guard(PlanMode.EXACT, prices, geometry)
        layout = guard.decide(counts_NE, geometry.static_layout).layout
        assert (layout != geometry.static_layout) == is_filled
        if is_filled:
            totals = exact_split(layout, 2).totals(counts_NE)
            assert totals.far_S.sum() < counts_NE.sum()


def test_chance_alone_brings_no_replica() -> None:
    """A microbatch of equally likely experts is never quite even; its forecasts are less so."""
    geometry = Geometry(4, 8, 3, 4, Sharding.EXPERTS)
    costs = make_costs(intra=FREE, pairs_per_rank=16384)
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts_NE = rng.multinomial(16384, [1 / 8] * 8, size=4).astype(np.int64)
        planned = GreedyStrategy(geometry, costs).plan(counts_NE, geometry.static_layout)
        assert planned == geometry.static_layout
        decision = Guard(PlanMode.EXACT, costs, geometry).decide(counts_NE, planned)
        assert decision.layout == geometry.static_layout


def test_a_forecast_is_priced_as_a_microbatch() -> None:
    # The fetch takes 0.3 s, and stock's placement loads rank 0 by a third more than the others.
    geometry = Geometry(3, 3, 2, 3, Sharding.EXPERTS)
    loads_NE = np.array([[4, 3, 3]] * 3) * 1000
    costs = make_costs(intra=Link(1e12, 0.1), points=((1, 1e12),))
    for tokens, pays in ((10**4, False), (10**9, True)):
        of_size = replace(costs, pairs_per_rank=tokens)
        for scale in (1, 100):
            layout = GreedyStrategy(geometry, of_size).plan(
                loads_NE * scale, geometry.static_layout
            )
            assert (layout != geometry.static_layout) == pays


def test_replicas_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="need --fsep-sharding experts"):
        replicate(COUNTS_NE, Geometry(4, 4, 2, 4))
