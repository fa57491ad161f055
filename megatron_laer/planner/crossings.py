"""Rows between nodes that counts of pairs of experts lead us to expect; no search.

With `--fsep-token-exchange node` a token is sent once to every node that it needs. The model is in
`native/crossings.hpp`.

Legend: E experts, M nodes, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.native_core import native


@dataclass(frozen=True, eq=False)
class Crossings:
    """Rows between nodes for tokens with these pairs, which come from all nodes alike.

    `pairs_EE` are the tokens that chose both of two experts, on the diagonal those of one.
    """

    pairs_EE: Int64

    def __post_init__(self) -> None:
        check_pairs(self.pairs_EE)

    @cached_property
    def top_k(self) -> int:
        """Return K: each token of an expert is in K of its pairs."""
        return max(round(float(self.pairs_EE.sum() / max(np.trace(self.pairs_EE), 1))), 1)

    def rows(self, node_E: Int64, num_nodes: int) -> float:
        """Expect the rows of a token to other nodes than its own, for the nodes of experts."""
        return native.crossing_rows(self.pairs_EE, node_E, num_nodes, self.top_k)


def check_pairs(pairs_EE: Int64) -> None:
    """Refuse a table that counts no pairs of experts."""
    is_square = pairs_EE.ndim == 2 and pairs_EE.shape[0] == pairs_EE.shape[1]
    if not is_square or (pairs_EE != pairs_EE.T).any() or (pairs_EE < 0).any():
        raise ValueError(
            f"pairs_EE of shape {pairs_EE.shape} is no table of pairs; give a symmetric one "
            "[experts, experts] of numbers of tokens"
        )
    if (pairs_EE > pairs_EE.diagonal()).any():
        expert = int(np.argmax((pairs_EE > pairs_EE.diagonal()).any(axis=0)))
        raise ValueError(
            f"expert {expert} is in {pairs_EE[:, expert].max()} tokens of a pair, but has "
            f"{pairs_EE[expert, expert]} tokens; the diagonal must count the tokens of each expert"
        )
