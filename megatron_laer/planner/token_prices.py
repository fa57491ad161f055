"""Prices of the token exchange in the cost model.

The cost model counts (token, expert) pairs. With `rank` each is a row on the links. With `node`,
and with the flex dispatcher, fewer rows cross nodes, in one stage after the other. `token_exchange`
computes the rows per pair, and the native core the seconds of a pass.

Legend: N ranks, M nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Dispatch
from megatron_laer.planner.geometry import Geometry

# All-to-Alls per direction: dispatch and combine.
_PASSES_OF_A_DIRECTION = 2


def all_to_alls(forwards: int) -> int:
    """Return the number of All-to-Alls of tokens in a layer's forwards and its backward."""
    return _PASSES_OF_A_DIRECTION * (forwards + 1)


@dataclass(frozen=True)
class TokenPrices:
    """Exchange of tokens, and rows of hidden states per pair.

    Attributes:
        intra_rows: rows inside nodes per pair; with `node` per pair that leaves its rank, since a
            row from another node is passed on inside.
        inter_rows: rows between nodes per pair that leaves its node.
    """

    dispatch: Dispatch = Dispatch.RANK
    intra_rows: float = 1.0
    inter_rows: float = 1.0

    @property
    def of_stock(self) -> TokenPrices:
        """Return the prices of stock in the same run: it shares the flex dispatcher alone."""
        return self if self.dispatch == Dispatch.FLEX else BY_RANK

    @property
    def in_stages(self) -> bool:
        """Return True if rows travel inside nodes after those between nodes."""
        return self.dispatch != Dispatch.RANK

    def pair_bytes(self, token_bytes: int) -> tuple[float, float]:
        """Return a pair's bytes inside nodes and between them."""
        return token_bytes * self.intra_rows, token_bytes * self.inter_rows

    def arriving_N(self, far_N: Int64, node_size: int) -> Int64:
        """Return the pairs that reach each rank from other nodes, of those that it computes.

        In stages rows cross nodes to the rank in their source's place, so a node's ranks receive
        alike.
        """
        if not self.in_stages:
            return far_N
        sums_M = far_N.reshape(-1, node_size).sum(axis=1)
        return np.repeat(-(-sums_M // node_size), node_size)

    def latency_seconds(
        self, geometry: Geometry, collective_s: float, in_node_s: float, forwards: int
    ) -> float:
        """Return the mean latency of one pass.

        `node` has two stages if there are several nodes of several ranks. Each forward also sends
        the rows' places and, with two stages, the bits of rows. The first one also sends sizes and
        waits for them on the host, which counts as another collective.

        Args:
            collective_s: latency of a collective of all ranks.
            in_node_s: latency of one inside a node.
            forwards: forwards of a microbatch; a re-run is the second.
        """
        if not self.in_stages or geometry.num_ranks == 1:
            return collective_s
        has_two_stages = 1 < geometry.node_size < geometry.num_ranks
        beside = 2 + (2 if has_two_stages else 1) * forwards
        latency_s = collective_s + beside * collective_s / all_to_alls(forwards)
        return latency_s + in_node_s if has_two_stages else latency_s


# Megatron's exchange.
BY_RANK = TokenPrices()
