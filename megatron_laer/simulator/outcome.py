"""One microbatch under one layout: loads, traffic and predicted seconds.

Shape suffixes: N ranks, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.config import EXACT_SPLIT
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.quotas import Int64, SplitTotals, even_split


@dataclass(frozen=True)
class Outcome:
    """What became of one microbatch.

    Attributes:
        tokens: all of the microbatch's (token, expert) pairs.
        largest_load: of a rank, in tokens.
        least_load: ceil(tokens / N), below which no layout and no split can bring the largest.
        off_node_tokens: tokens that are computed on another node than their own.
        layer_s: predicted seconds of the layer, forward and backward.
        least_s: the same for `least_load` on one expert and without any communication.
    """

    num_ranks: int
    tokens: int
    largest_load: int
    least_load: int
    off_node_tokens: int
    layer_s: float
    least_s: float

    @property
    def max_over_mean(self) -> float:
        """Largest over mean rank load."""
        return self.largest_load * self.num_ranks / self.tokens

    @property
    def load_over_bound(self) -> float:
        """Largest load over the least that is possible; 1 is perfect."""
        return self.largest_load / self.least_load


def evaluate(
    counts_NE: Int64, layout: ExpertLayout, node_size: int, split: str, costs: CostModel
) -> Outcome:
    """The outcome of counts with at least one token.

    Raises:
        ValueError: counts of another shape than the layout's.
    """
    totals = _totals(counts_NE, layout, node_size, split)
    loads_N = (totals.near_S + totals.far_S).reshape(layout.num_ranks, -1).sum(axis=1)
    tokens = int(counts_NE.sum())
    least_load = -(-tokens // layout.num_ranks)
    return Outcome(
        num_ranks=layout.num_ranks,
        tokens=tokens,
        largest_load=int(loads_N.max()),
        least_load=least_load,
        off_node_tokens=int(totals.far_S.sum()),
        layer_s=_layer_seconds(totals, layout, costs),
        least_s=least_seconds(least_load, costs),
    )


def least_seconds(least_load: int, costs: CostModel) -> float:
    """Predicted seconds of a rank that computes so many tokens of one expert, its own."""
    alone = ExpertLayout.static(1, 1, 1)
    return costs.layer_seconds(np.array([[least_load]], dtype=np.int64), alone, 1)


def _totals(counts_NE: Int64, layout: ExpertLayout, node_size: int, split: str) -> SplitTotals:
    if split == EXACT_SPLIT:
        return exact_split(layout, node_size).totals(counts_NE)
    return even_split(layout, node_size).totals(counts_NE)


# TEMPORARY
def _layer_seconds(totals: SplitTotals, layout: ExpertLayout, costs: CostModel) -> float:
    near_N = totals.near_S.reshape(layout.num_ranks, -1).sum(axis=1)
    far_N = totals.far_S.reshape(layout.num_ranks, -1).sum(axis=1)
    intra_N = np.maximum(totals.sent_near_N, near_N) - totals.own_N
    inter_N = np.maximum(totals.sent_far_N, far_N)
    tokens_s = costs.token_bytes * (
        intra_N / costs.intra_bytes_per_s + inter_N / costs.inter_bytes_per_s
    )
    experts_s = 3 * costs.expert_s_per_token * int((near_N + far_N).max())
    return float(experts_s + 4 * tokens_s.max())
