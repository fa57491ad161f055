"""A layer's predicted time is compared with stock's, with forced balance and with a bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import Dispatch, PlanMode, Sharding, Split
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import (
    Outcome,
    Price,
    forced_balance_counts_NE,
    price,
    stock_seconds,
)
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.token_prices import TokenPrices
from tests.recorded_runs import COSTS, GEOMETRY, GUARD, counts_NE


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9), st.integers(1, 70))
def test_forced_balance_keeps_each_ranks_tokens_and_evens_out_experts(
    tokens: list[int], experts: int
) -> None:
    counts = forced_balance_counts_NE(np.array(tokens, dtype=np.int64), experts)
    assert counts.sum(axis=1).tolist() == tokens
    loads_E = counts.sum(axis=0)
    assert loads_E.max() - loads_E.min() <= 1
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def priced(guard: Guard, counts: Int64, planned: ExpertLayout) -> Price:
    return price(guard, Outcome(guard.decide(counts, planned)))


@pytest.mark.parametrize(
    ("mode", "split"), [*((mode, Split.EXACT) for mode in GUARD_MODES), ("forecast", Split.EVEN)]
)
def test_a_price_of_rows_is_the_layers_and_the_changes(mode: PlanMode, split: Split) -> None:
    guard = Guard(mode, COSTS, GEOMETRY, split=split)
    counts = counts_NE(1, 0, 0)
    planned = ExpertLayout.static(4, 3, 8)
    decision = guard.decide(counts, planned)
    predicted = price(guard, Outcome(decision))
    chosen = Placed(decision.layout, GEOMETRY)
    layer_s = COSTS.layer_seconds(counts, chosen, split)
    change_s = COSTS.change_seconds(planned, chosen)
    assert predicted.layer_s == layer_s + (change_s if decision.replanned else 0.0)
    assert predicted.bound_s <= predicted.layer_s
    assert predicted.balanced_s < predicted.stock_s


def test_replicas_cost_their_exposed_exchanges_and_host_time_where_experts_are_at_home() -> None:
    geometry = replace(GEOMETRY, sharding=Sharding.EXPERTS)
    guard = Guard(PlanMode.ADAPTIVE, replace(COSTS, cluster=load_cluster("h100-8")), geometry)
    costs, counts, home = guard.costs, counts_NE(1, 0, 0) // 8, geometry.static_layout
    # Of both layouts, since a pass fetches the planned one and reduces the chosen one.
    planned = geometry.random_layout((1,))
    kept, bare = (priced(guard, counts, layout) for layout in (planned, home))
    beside_s, of_planned = kept.bound_s, Placed(planned, geometry)
    decision = guard.decide(counts, planned)
    chosen = Placed(decision.layout, geometry)
    before, after = (costs.exposed(of, beside_s) for of in (of_planned, chosen))
    exchanges_s = before.forward_s + after.backward_s + after.host_s
    assert exchanges_s > 0
    tokens_s = costs.split_seconds(decision.quotas.totals(), geometry)
    change_s = costs.change_seconds(planned, chosen) if decision.replanned else 0.0
    assert kept.layer_s == tokens_s + exchanges_s + change_s
    assert costs.exposed(Placed(home, geometry), beside_s).exchanges_s == 0
    assert bare.balanced_s == kept.balanced_s


def test_stock_sends_its_tokens_by_rank_also_beside_tokens_through_nodes() -> None:
    counts, layout = counts_NE(1, 0, 0), ExpertLayout.static(4, 3, 8)
    through_nodes = replace(COSTS, tokens=TokenPrices(Dispatch.NODE, 0.5, 0.25))
    by_rank, by_node = (
        priced(guard, counts, layout)
        for guard in (Guard(PlanMode.FORECAST, costs, GEOMETRY) for costs in (COSTS, through_nodes))
    )
    assert by_node.layer_s != by_rank.layer_s
    assert by_node.stock_s == by_rank.stock_s and by_node.balanced_s == by_rank.balanced_s


def test_stock_with_balanced_routing_is_forced_balance() -> None:
    counts = np.full((4, 8), 128, dtype=np.int64)
    predicted = priced(GUARD, counts, ExpertLayout.static(4, 3, 8))
    assert predicted.stock_s == predicted.balanced_s == stock_seconds(COSTS, GEOMETRY, counts)
