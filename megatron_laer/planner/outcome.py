"""Outcome of one microbatch in one layer, and its price.

`price` is the only one: metrics, recordings, `report`, `plan` and its what-if have it. The guard
weighs the same seconds in native code.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Split
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import SplitTotals

# Version of `price` in recordings. The first one left out exposed exchanges of replicas.
PRICES = 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """Decision on one pass of a layer, and the host's seconds for it."""

    decision: Decision
    decide_s: float = 0.0

    @property
    def counts_NE(self) -> Int64:
        return self.decision.quotas.counts_NE

    @cached_property
    def totals(self) -> SplitTotals:
        return self.decision.quotas.totals()

    @cached_property
    def tokens_N(self) -> Int64:
        return fsep_tokens_N(self.decision.quotas)

    @cached_property
    def ratio(self) -> float:
        """Return the tokens of the busiest rank over the mean."""
        return max_over_mean(self.tokens_N)

    @cached_property
    def stock_ratio(self) -> float:
        return max_over_mean(stock_tokens_N(self.counts_NE))


@dataclass(frozen=True, eq=False)
class Price:
    """Predicted seconds of one layer and microbatch, forward and backward.

    Attributes:
        layer_s: time as decided, with the cost of a fresh layout. Where experts are at home, it
            has the exposed exchanges of replicas and the host's time for them. Rows are taken to
            be restored unseen.
        bound_s: lower bound for all layouts of this capacity and all splits.
    """

    layer_s: float
    bound_s: float
    costs: CostModel
    geometry: Geometry
    counts_NE: Int64

    @property
    def stock_s(self) -> float:
        """Return the time under stock Megatron's placement."""
        return stock_seconds(self.costs, self.geometry, self.counts_NE)

    @property
    def balanced_s(self) -> float:
        """Return stock's time with forced balance: as many tokens, evenly for all experts."""
        return balanced_seconds(self.costs, self.geometry, self.counts_NE)


def price(guard: Guard, outcome: Outcome) -> Price:
    """Predict the seconds of a decided microbatch."""
    costs, geometry = guard.costs, guard.geometry
    decision, counts_NE = outcome.decision, outcome.counts_NE
    bound_s = costs.least_layer_seconds(counts_NE, geometry)
    layer_s = costs.split_seconds(outcome.totals, geometry)
    if geometry.home_slots:
        layer_s += _exchanges_seconds(guard, decision, bound_s)
    if decision.replanned:
        chosen = Placed(decision.layout, geometry)
        layer_s += costs.change_seconds(decision.planned_layout, chosen)
    return Price(layer_s, bound_s, costs, geometry, counts_NE)


def _exchanges_seconds(guard: Guard, decision: Decision, beside_s: float) -> float:
    """Predict exposed exchanges, in forward of the planned layout, in backward of the chosen.

    The host's time for the chosen one's replicas comes on top.
    """
    planned, chosen = (
        guard.costs.exposed(Placed(layout, guard.geometry), beside_s)
        for layout in (decision.planned_layout, decision.layout)
    )
    return planned.forward_s + chosen.backward_s + chosen.host_s


def stock_seconds(costs: CostModel, geometry: Geometry, counts_NE: Int64) -> float:
    """Predict a layer's seconds with stock's placement and dispatch of tokens.

    Where N does not divide E, which stock refuses, some experts have two slots.
    """
    stock = stock_placement(geometry.num_ranks, geometry.num_experts, geometry.node_size)
    # With one slot per expert all splits are equal, and the exact one is native code.
    costs = replace(costs, tokens=costs.tokens.of_stock)
    return costs.layer_seconds(counts_NE, stock, Split.EXACT)


def balanced_seconds(costs: CostModel, geometry: Geometry, counts_NE: Int64) -> float:
    """Predict stock's seconds with forced balance of as many tokens on each rank."""
    return _balanced_seconds(costs, geometry, tuple(counts_NE.sum(axis=1).tolist()))


def forced_balance_counts_NE(tokens_N: Int64, num_experts: int) -> Int64:
    """Deal each rank's tokens out to all experts, as Megatron's forced balance does on average.

    Remainders go to one expert after the other, rank after rank.
    """
    share_N, left_N = np.divmod(tokens_N, num_experts)
    begin_N = np.cumsum(left_N) - left_N
    place_NE = (np.arange(num_experts)[None, :] - begin_N[:, None]) % num_experts
    counts_NE: Int64 = share_N[:, None] + (place_NE < left_N[:, None])
    return counts_NE


@lru_cache(maxsize=16)
def stock_placement(num_ranks: int, num_experts: int, node_size: int) -> Placed:
    geometry = Geometry(num_ranks, num_experts, -(-num_experts // num_ranks), node_size)
    return Placed(geometry.static_layout, geometry)


@lru_cache(maxsize=256)
def _balanced_seconds(costs: CostModel, geometry: Geometry, tokens_N: tuple[int, ...]) -> float:
    counts_NE = forced_balance_counts_NE(np.array(tokens_N, dtype=np.int64), geometry.num_experts)
    return stock_seconds(costs, geometry, counts_NE)
