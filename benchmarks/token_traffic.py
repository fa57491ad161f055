"""Formulas of a layer's token exchange: its traffic on the links, in rows and in bytes.

A row is one hidden state. Megatron's exchange `rank` sends one for every (token, expert) pair. With
`node`, one travels for every token and node that has experts of it, between ranks with the same
local rank. Inside the node, one then travels for every token and rank. Combine reverses these
paths, and the backward pass of either takes the path of the other.

Probabilities and places of rows, a few bytes per pair, are counted separately (`metadata_bytes`).

Legend: N ranks, E experts, C slots per rank, S = N·C slots, G ranks per node, M = N/G nodes; rank
n = J·G + g is local rank g of node J; T tokens, P (token, expert) pairs of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import TokenExchange
from megatron_laer.planner.geometry import check_node_size

_PROBABILITY_BYTES, _PLACE_BYTES, _SIZE_BYTES = 4, 4, 4


@dataclass(frozen=True, eq=False)
class TokenTraffic:
    """Rows or bytes of one exchange per rank and link class, without those that stay on a rank.

    `intra` is traffic with ranks of the same node, `inter` with those of other nodes.
    """

    intra_N: Int64
    inter_N: Int64
    sent_intra_N: Int64
    sent_inter_N: Int64

    def transposed(self) -> TokenTraffic:
        """Return the traffic of the exchange in the other direction."""
        return TokenTraffic(self.sent_intra_N, self.sent_inter_N, self.intra_N, self.inter_N)

    def times(self, row_bytes: int) -> TokenTraffic:
        """Convert rows of `row_bytes` to bytes."""
        return TokenTraffic(
            self.intra_N * row_bytes,
            self.inter_N * row_bytes,
            self.sent_intra_N * row_bytes,
            self.sent_inter_N * row_bytes,
        )

    def __add__(self, other: TokenTraffic) -> TokenTraffic:
        return TokenTraffic(
            self.intra_N + other.intra_N,
            self.inter_N + other.inter_N,
            self.sent_intra_N + other.sent_intra_N,
            self.sent_inter_N + other.sent_inter_N,
        )


@dataclass(frozen=True, eq=False)
class TokenRouting:
    """Numbers of pairs and of distinct tokens from each rank to each rank and node.

    `pairs_NN` are by source rank and rank, `to_ranks_NN` the distinct tokens that have such pairs.
    `to_nodes_NM` are the distinct tokens of each source that go to any rank of each node.
    """

    pairs_NN: Int64
    to_ranks_NN: Int64
    to_nodes_NM: Int64
    node_size: int

    @classmethod
    def count(
        cls, maps: Sequence[Bool], slots: Sequence[npt.NDArray[Any]], capacity: int, node_size: int
    ) -> TokenRouting:
        """Count a known routing.

        `maps` are each rank's router map, bool [T, E]; T may differ. `slots` are each rank's slots
        of its pairs, by expert, then token (see `token_routes.token_order`).
        """
        num_ranks = len(maps)
        check_node_size(num_ranks, node_size)
        num_nodes = num_ranks // node_size
        pairs_NN, to_ranks_NN = np.zeros((2, num_ranks, num_ranks), dtype=np.int64)
        to_nodes_NM = np.zeros((num_ranks, num_nodes), dtype=np.int64)
        for source, (map_TE, slot_P) in enumerate(zip(maps, slots, strict=True)):
            token_P = np.nonzero(map_TE.T)[1]
            if len(token_P) != len(slot_P):
                raise ValueError(
                    f"rank {source} has {len(token_P)} pairs and was given {len(slot_P)} slots"
                )
            rank_P = slot_P.astype(np.int64) // capacity
            pairs_NN[source] = np.bincount(rank_P, minlength=num_ranks)
            reaches_TN = np.zeros((len(map_TE), num_ranks), dtype=np.bool_)
            reaches_TN[token_P, rank_P] = True
            to_ranks_NN[source] = reaches_TN.sum(axis=0)
            reaches_TM = reaches_TN.reshape(-1, num_nodes, node_size).any(axis=2)
            to_nodes_NM[source] = reaches_TM.sum(axis=0)
        return cls(pairs_NN, to_ranks_NN, to_nodes_NM, node_size)


def dispatch_rows(routing: TokenRouting, exchange: TokenExchange) -> TokenTraffic:
    """Count the rows of hidden states that one dispatch moves; combine moves them back.

    With p(n, m) pairs and d(n, m) distinct tokens of rank n for rank m, and D(n, J) for node J,
    rank n = (J, g) sends, and receives with both arguments exchanged,

        rank  Σ p(n, m) over m ≠ n in J intra              Σ p(n, m) over m not in J inter
        node  Σ d((J', g), m) over all J', m ≠ n in J      Σ D(n, J') over J' ≠ J inter

    since the rank with the source's local rank forwards rows from other nodes inside node J. Over
    the ranks m of node J, D(n, J) ≤ Σ d(n, m) ≤ Σ p(n, m). So with `node` no rank sends more to
    other nodes than with `rank`, and no node receives more; a single rank may.
    """
    num_ranks, size = len(routing.pairs_NN), routing.node_size
    node_N = np.arange(num_ranks) // size
    is_near_NN = node_N[:, None] == node_N
    if exchange == TokenExchange.RANK:
        return _between_ranks(routing.pairs_NN, is_near_NN)
    inter_NM = np.where(node_N[:, None] == np.arange(num_ranks // size), 0, routing.to_nodes_NM)
    # Rows for rank m arrive over each local rank g of its node, from all nodes.
    passed_GN = routing.to_ranks_NN.reshape(-1, size, num_ranks).sum(axis=0)
    passed_NN = np.where(is_near_NN, passed_GN[np.arange(num_ranks) % size], 0)
    inside = _between_ranks(passed_NN, is_near_NN)
    return TokenTraffic(
        intra_N=inside.intra_N,
        # Local rank g of node J receives the rows that the same local ranks of other nodes send.
        inter_N=inter_NM.reshape(-1, size, num_ranks // size).sum(axis=0).T.ravel(),
        sent_intra_N=inside.sent_intra_N,
        sent_inter_N=inter_NM.sum(axis=1),
    )


def metadata_bytes(routing: TokenRouting, exchange: TokenExchange) -> TokenTraffic:
    """Count the bytes that one dispatch moves without hidden states.

    `rank` sends the probability of each pair. `node` also sends the place of each pair's row. With
    two stages, a row between nodes also carries one bit for each local rank. Each rank first sends
    one size to every other. With two stages, ranks that exchange rows between nodes add as many
    sizes as a node has ranks (`token_rows.SizeMessages`).
    """
    num_ranks, size = len(routing.pairs_NN), routing.node_size
    pairs = dispatch_rows(routing, TokenExchange.RANK)
    if exchange == TokenExchange.RANK:
        return pairs.times(_PROBABILITY_BYTES)
    moved = pairs.times(_PROBABILITY_BYTES + _PLACE_BYTES)
    near_sizes, far_sizes = size - 1, num_ranks - size
    if 1 < size < num_ranks:
        far_sizes += (num_ranks // size - 1) * size
        none_N = np.zeros(num_ranks, dtype=np.int64)
        rows = dispatch_rows(routing, exchange)
        crossing = TokenTraffic(none_N, rows.inter_N, none_N, rows.sent_inter_N)
        moved += crossing.times(-(-size // 8))
    near_N, far_N = (
        np.full(num_ranks, sizes * _SIZE_BYTES, dtype=np.int64) for sizes in (near_sizes, far_sizes)
    )
    return moved + TokenTraffic(near_N, far_N, near_N, far_N)


def metadata_bytes_backward(routing: TokenRouting) -> TokenTraffic:
    """Count the bytes of the probabilities' gradients, which return pair by pair with either."""
    pairs = dispatch_rows(routing, TokenExchange.RANK)
    return pairs.transposed().times(_PROBABILITY_BYTES)


def _between_ranks(rows_NN: Int64, is_near_NN: Bool) -> TokenTraffic:
    """Sum each rank's rows to each other rank, [N, N], by link class."""
    near_NN = np.where(is_near_NN & ~np.eye(len(rows_NN), dtype=np.bool_), rows_NN, 0)
    far_NN = np.where(is_near_NN, 0, rows_NN)
    return TokenTraffic(
        intra_N=near_NN.sum(axis=0),
        inter_N=far_NN.sum(axis=0),
        sent_intra_N=near_NN.sum(axis=1),
        sent_inter_N=far_NN.sum(axis=1),
    )
