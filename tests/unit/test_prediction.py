"""A layer's predicted time is compared with stock's, with forced balance and with a bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_laer.choices import TokenExchange
from megatron_laer.config import PlanMode, Split
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.prediction import forced_balance_counts_NE, predict, stock_seconds
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


@pytest.mark.parametrize(
    ("mode", "split"), [*((mode, Split.EXACT) for mode in GUARD_MODES), ("forecast", Split.EVEN)]
)
def test_a_prediction_is_the_cost_models(mode: PlanMode, split: Split) -> None:
    guard = Guard(mode, COSTS, GEOMETRY, split=split)
    counts = counts_NE(1, 0, 0)
    planned = ExpertLayout.static(4, 3, 8)
    decision = guard.decide(counts, planned)
    predicted = predict(guard, decision)
    chosen = Placed(decision.layout, GEOMETRY)
    layer_s = COSTS.layer_seconds(counts, chosen, split)
    change_s = COSTS.change_seconds(planned, chosen)
    assert predicted.layer_s == layer_s + (change_s if decision.replanned else 0.0)
    assert predicted.bound_s <= predicted.layer_s
    assert predicted.balanced_s < predicted.stock_s


def test_stock_sends_its_tokens_by_rank_also_beside_tokens_through_nodes() -> None:
    counts, layout = counts_NE(1, 0, 0), ExpertLayout.static(4, 3, 8)
    through_nodes = replace(COSTS, tokens=TokenPrices(TokenExchange.NODE, 0.5, 0.25))
    by_rank, by_node = (
        predict(guard, guard.decide(counts, layout))
        for guard in (Guard(PlanMode.FORECAST, costs, GEOMETRY) for costs in (COSTS, through_nodes))
    )
    assert by_node.layer_s != by_rank.layer_s
    assert by_node.stock_s == by_rank.stock_s and by_node.balanced_s == by_rank.balanced_s


def test_stock_with_balanced_routing_is_forced_balance() -> None:
    counts = np.full((4, 8), 128, dtype=np.int64)
    predicted = predict(GUARD, GUARD.decide(counts, ExpertLayout.static(4, 3, 8)))
    assert predicted.stock_s == predicted.balanced_s == stock_seconds(COSTS, GEOMETRY, counts)
