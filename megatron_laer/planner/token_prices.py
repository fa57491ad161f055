"""`TokenPrices` says what tokens cost in the cost model, with either exchange of tokens.

The cost model counts (token, expert) pairs. With `rank` each is a row on the links; with `node`
rows are fewer between nodes and come one stage after the other. How many rows stand for a pair is
given: see `token_exchange`. The native core has the same formulas, term by term.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import TokenExchange
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.quotas import SplitTotals

# Dispatch and combine.
_PASSES_OF_A_DIRECTION = 2


def all_to_alls(forwards: int) -> int:
    """Count the All-to-Alls of tokens in a layer's forwards and its backward."""
    return _PASSES_OF_A_DIRECTION * (forwards + 1)


@dataclass(frozen=True)
class TokenPrices:
    """Holds how tokens travel, and how many rows of hidden states stand for a pair.

    Attributes:
        exchange: how tokens travel.
        intra_rows: rows inside nodes, per pair; with `node` per pair that leaves its rank, since a
            row from another node is passed on inside.
        inter_rows: rows between nodes, per pair that leaves its node.
    """

    exchange: TokenExchange = TokenExchange.RANK
    intra_rows: float = 1.0
    inter_rows: float = 1.0

    @property
    def in_stages(self) -> bool:
        """Tell whether rows travel inside nodes after those between nodes, not beside them."""
        return self.exchange == TokenExchange.NODE

    def pair_bytes(self, token_bytes: int) -> tuple[float, float]:
        """Return the bytes inside nodes and between them that a pair stands for."""
        return token_bytes * self.intra_rows, token_bytes * self.inter_rows

    def pass_seconds(self, totals: SplitTotals, cluster: Cluster, token_bytes: int) -> float:
        """Predict one pass of the exchange, without latency.

        That is the time of the rank that takes longest: per link class the slower of send and
        receive (links are full duplex), and of the classes the slower, as one collective drives
        both, like a flat restore (`Traffic.seconds`). Tokens for a rank's own slots travel nowhere.
        In stages the classes add up, and inside nodes travels all that a rank computes for others.
        """
        near_N = totals.near_S.reshape(len(totals.own_N), -1).sum(axis=1)
        far_N = totals.far_S.reshape(len(totals.own_N), -1).sum(axis=1)
        inside_N = near_N + far_N if self.in_stages else np.maximum(totals.sent_near_N, near_N)
        intra = (inside_N - totals.own_N).max()
        inter = np.maximum(totals.sent_far_N, far_N).max()
        intra_bytes, inter_bytes = self.pair_bytes(token_bytes)
        intra_s = float(intra * (intra_bytes / cluster.intra.bytes_per_s))
        inter_s = float(inter * (inter_bytes / cluster.inter.bytes_per_s))
        return intra_s + inter_s if self.in_stages else max(intra_s, inter_s)

    def least_pass_seconds(
        self, counts_NE: Int64, geometry: Geometry, cluster: Cluster, token_bytes: int
    ) -> float:
        """Return seconds of one pass that no layout of this geometry and no split gets below.

        A rank keeps at most those tokens of its own C most wanted experts, and the others leave it
        over all its links at once; a node keeps at most those of its G*C most wanted, and the
        others leave over its ranks' links to other nodes. In stages only the latter is told: of the
        rows inside a node not even the least number follows from counts.
        """
        num_ranks, node_size, capacity = geometry.num_ranks, geometry.node_size, geometry.capacity
        intra, inter = cluster.intra, cluster.inter
        _, inter_bytes = self.pair_bytes(token_bytes)
        pass_s = 0.0
        if num_ranks > 1 and not self.in_stages:
            near_bytes_per_s = intra.bytes_per_s if node_size > 1 else 0.0
            far_bytes_per_s = inter.bytes_per_s if geometry.num_nodes > 1 else 0.0
            pass_s = _least_leaving(counts_NE, capacity) / (near_bytes_per_s + far_bytes_per_s)
        if geometry.num_nodes > 1:
            node_counts_QE = counts_NE.reshape(geometry.num_nodes, node_size, -1).sum(axis=1)
            leaving = _least_leaving(node_counts_QE, node_size * capacity)
            pass_s = max(pass_s, leaving / node_size / inter.bytes_per_s)
        return pass_s * inter_bytes

    def latency_seconds(
        self, geometry: Geometry, collective_s: float, in_node_s: float, forwards: int
    ) -> float:
        """Return the latency of one pass, the mean of all.

        `node` has two stages, if nodes have several ranks and there are several nodes. It also
        sends, in each forward, the rows' places and, with two stages, the bits of rows; and in the
        first the sizes, for which it waits on the host: taken to be as long as another collective.

        Args:
            collective_s: of a collective of all ranks.
            in_node_s: of one inside a node.
            forwards: of a microbatch; a re-run is the second.
        """
        if not self.in_stages or geometry.num_ranks == 1:
            return collective_s
        has_two_stages = 1 < geometry.node_size < geometry.num_ranks
        beside = 2 + (2 if has_two_stages else 1) * forwards
        latency_s = collective_s + beside * collective_s / all_to_alls(forwards)
        return latency_s + in_node_s if has_two_stages else latency_s


# Megatron's exchange.
BY_RANK = TokenPrices()


def _least_leaving(counts: Int64, kept_experts: int) -> int:
    """Return the tokens that leave the row that keeps fewest, if rows keep their top experts'."""
    others = counts.shape[1] - kept_experts
    if others <= 0:
        return 0
    return int(np.partition(counts, others - 1, axis=1)[:, :others].sum(axis=1).max())
