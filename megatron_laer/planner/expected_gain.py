"""Gain over stock expert parallelism that training predicts when it starts.

A layer and microbatch are priced, of experts and tokens alone, as `sharding_choice` prices them.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.clusters import SolveTime
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.outcome import stock_placement
from megatron_laer.planner.sharding_choice import DRAWS, planned_seconds
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.planner.typical import typical_counts_NE


@dataclass(frozen=True)
class ExpectedGain:
    """Predicted milliseconds of a MoE layer and microbatch, with even routing and typical skew."""

    cluster: str
    stock_ms: tuple[float, float]
    fsep_ms: tuple[float, float]

    @property
    def factors(self) -> tuple[float, float]:
        """Return how many times as fast as stock FSEP is, the smaller factor first."""
        even, skewed = (s / f for s, f in zip(self.stock_ms, self.fsep_ms, strict=True))
        return min(even, skewed), max(even, skewed)

    def __str__(self) -> str:
        low, high = self.factors
        found = f"{low:.2f} to {high:.2f} times as fast as stock's"
        if high <= 1.0:
            found += ", no gain (leave --expert-parallel-mode fsep out)"
        return f"expected on {self.cluster}, from even routing to typical skew: MoE layers {found}"


def expected_gain(config: FSEPConfig, geometry: Geometry, costs: CostModel) -> ExpectedGain | None:
    """Predict the gain of a run; None where stock cannot share the experts out to the ranks."""
    num_ranks, num_experts = geometry.num_ranks, geometry.num_experts
    if num_experts % num_ranks:
        return None
    pairs = costs.pairs_per_rank
    counts = [typical_counts_NE(geometry, pairs, draw) for draw in range(DRAWS)]
    even_NE = np.full_like(counts[0], max(int(counts[0][0].sum()) // num_experts, 1))
    placement = stock_placement(num_ranks, num_experts, geometry.node_size)
    of_stock = _of_stock(costs)

    def range_ms(seconds: Callable[[Int64], float]) -> tuple[float, float]:
        return 1e3 * seconds(even_NE), 1e3 * sum(map(seconds, counts)) / DRAWS

    return ExpectedGain(
        costs.cluster.name,
        range_ms(lambda counts_NE: of_stock.layer_seconds(counts_NE, placement)),
        range_ms(lambda counts_NE: planned_seconds(config, geometry, costs, counts_NE)),
    )


def _of_stock(costs: CostModel) -> CostModel:
    """Return stock's prices: tokens by Megatron's exchange, and nothing to decide at the gate."""
    cluster = costs.cluster
    if cluster.host is not None:
        cluster = replace(cluster, host=replace(cluster.host, gate=SolveTime(0.0, 0.0, 0.0)))
    return replace(costs, cluster=cluster, tokens=BY_RANK)
