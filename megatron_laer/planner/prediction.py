"""Predicted layer time of a microbatch, next to stock, forced balance and a lower bound.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.config import Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import ExactQuotas
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import even_split
from megatron_laer.planner.token_prices import BY_RANK


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one layer and microbatch, forward and backward.

    Attributes:
        layer_s: time as decided, with the cost of a fresh layout.
        stock_s: time under stock Megatron's placement.
        balanced_s: stock with forced balance: as many tokens, the same number for each expert.
        bound_s: lower bound for all layouts of this capacity and all splits.
    """

    layer_s: float
    stock_s: float
    balanced_s: float
    bound_s: float


def predict(guard: Guard, decision: Decision) -> Prediction:
    costs, geometry = guard.costs, guard.geometry
    quotas, counts_NE = decision.quotas, decision.quotas.counts_NE
    if isinstance(quotas, ExactQuotas):
        totals = quotas.totals()
    else:
        totals = even_split(decision.layout, geometry.node_size).totals(counts_NE)
    layer_s = costs.split_seconds(totals, geometry)
    if decision.replanned:
        chosen = Placed(decision.layout, geometry)
        layer_s += costs.change_seconds(decision.planned_layout, chosen)
    return Prediction(
        layer_s=layer_s,
        stock_s=stock_seconds(costs, geometry, counts_NE),
        balanced_s=_balanced_seconds(costs, geometry, tuple(counts_NE.sum(axis=1).tolist())),
        bound_s=costs.least_layer_seconds(counts_NE, geometry),
    )


def stock_seconds(costs: CostModel, geometry: Geometry, counts_NE: Int64) -> float:
    """Predict a layer's seconds with stock's placement and exchange of tokens.

    Where N does not divide E, which stock refuses, some experts have two slots.
    """
    stock = stock_placement(geometry.num_ranks, geometry.num_experts, geometry.node_size)
    # With one slot per expert all splits are equal, and the exact one is native code.
    return replace(costs, tokens=BY_RANK).layer_seconds(counts_NE, stock, Split.EXACT)


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
