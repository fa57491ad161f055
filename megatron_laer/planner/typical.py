"""Typical and skewed loads, for choices that are made once, before anything is observed.

Typical ones are log-normal, sigma 0.6. All are the same on every rank and machine.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home import replicate
from megatron_laer.planner.layout import ExpertLayout

_SIGMA = 0.6
# Tokens of a mean expert on a rank, where the number is of no account.
_TOKENS = 1000


def typical_counts_NE(
    geometry: Geometry, pairs_per_rank: int | None = None, draw: int = 0
) -> Int64:
    """Return counts [N, E] that add up to about `pairs_per_rank` on each rank.

    Draws have the same loads, of other experts.
    """
    num_experts = geometry.num_experts
    normal = NormalDist(0, _SIGMA)
    share_E = np.exp([normal.inv_cdf((e + 0.5) / num_experts) for e in range(num_experts)])
    # Raw words: NumPy promises stable streams for these alone.
    order_E = np.argsort(np.random.PCG64(draw).random_raw(num_experts), kind="stable")
    unit = (pairs_per_rank or _TOKENS * num_experts) / share_E.sum()
    counts_E = np.rint(unit * share_E[order_E]).astype(np.int64)
    return np.tile(counts_E, (geometry.num_ranks, 1))


def skewed_counts_NE(
    geometry: Geometry, top_k: int, pairs_per_rank: int | None = None
) -> list[Int64]:
    """Return counts [N, E] of routing that takes many replicas, of about as many pairs on a rank.

    In the first all tokens have experts of rank 0. In the second neighbours, a quarter of the
    experts, have three quarters of the tokens, as in Megatron's imbalance benchmark. In the others
    one expert has each token, rank 0 has none, and half of the experts have none.
    """
    num_experts, home = geometry.num_experts, geometry.home_slots
    pairs = pairs_per_rank or _TOKENS * num_experts

    def counts_NE(hot: slice, share: float) -> Int64:
        counts_E = np.full(num_experts, (1.0 - share) * pairs / num_experts)
        counts_E[hot] += share * pairs / len(counts_E[hot])
        return np.tile(np.rint(counts_E).astype(np.int64), (geometry.num_ranks, 1))

    return [
        counts_NE(slice(max(top_k, home)), 1.0),
        counts_NE(slice(max(top_k, num_experts // 4)), 0.75),
        counts_NE(slice(1), 1.0 / top_k),
        counts_NE(slice(home, None), 1.0),
        counts_NE(slice(num_experts // 2, None), 1.0),
    ]


def typical_layout(geometry: Geometry) -> ExpertLayout:
    """Return the layout for which exchanges are compared: static, or one with replicas."""
    if geometry.sharding == Sharding.ROWS:
        return geometry.static_layout
    return replicate(typical_counts_NE(geometry), geometry).layout
