"""Rows between nodes by cause: the one definition of `plan`, `report`, `simulate` and `advise`.

A row is a hidden state in one token exchange, and a pair a token with one of its experts:

      home        one copy of each expert in the order of their numbers, and a row for each pair
    - replicas    pairs that a layout and its quotas bring to their token's node; may be negative
    - shared      pairs of one token on one node, which `node` exchanges as one row
    = sent

The first two are counted. Counts do not say which experts one token chose. So `shared` is assumed
as in token prices, for independent choices, and is up to an eighth too many. Placement by
co-activation would be between the last two. It needs pairs, and `homes` counts it from them.

Legend: N ranks, E experts, M nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import TokenExchange
from megatron_laer.planner.quotas import SplitTotals
from megatron_laer.planner.token_prices import TokenPrices

CAUSES = ("home", "replicas", "shared", "sent")
ASSUMED = """\
rows: between nodes, per token and expert. home: with one copy of each expert, in this order; less
those of replicas; less those shared with another expert of the token, which is assumed for
independent choices, since counts do not say which experts a token chose; sent: the rest."""


@dataclass(frozen=True)
class NodeRows:
    """Pairs of some microbatches, those that leave their node by cause, and the rows sent."""

    pairs: int
    home: int
    off_node: int
    sent: float

    @classmethod
    def of(
        cls, counts_NE: Int64, node_size: int, totals: SplitTotals, prices: TokenPrices
    ) -> NodeRows:
        """Count a microbatch from the totals of its split."""
        off_node = int(totals.far_S.sum())
        sent = float(off_node)
        if prices.exchange == TokenExchange.NODE:
            sent = prices.sent_between_nodes(totals)
        return cls(int(counts_NE.sum()), home_pairs(counts_NE, node_size), off_node, sent)


def home_pairs(counts_NE: Int64, node_size: int) -> int:
    """Return the pairs that leave their node where each expert has one copy, in order."""
    num_ranks, num_experts = counts_NE.shape
    counts_ME = counts_NE.reshape(-1, node_size, num_experts).sum(axis=1, dtype=np.int64)
    node_E = np.arange(num_experts) * num_ranks // num_experts // node_size
    return int(counts_ME.sum() - counts_ME[node_E, np.arange(num_experts)].sum())


def by_cause(rows: Iterable[NodeRows]) -> dict[str, float]:
    """Return the rows of `CAUSES` per pair, over all microbatches."""
    found = list(rows)
    pairs = sum(of.pairs for of in found)
    home, off_node, sent = (
        sum(getattr(of, name) for of in found) / max(pairs, 1)
        for name in ("home", "off_node", "sent")
    )
    return dict(zip(CAUSES, (home, home - off_node, off_node - sent, sent), strict=True))


def in_words(causes: Mapping[str, float]) -> str:
    home, replicas, shared, sent = (f"{causes[name]:.1%}" for name in CAUSES)
    return f"{home} - {replicas} - {shared} = {sent}"
