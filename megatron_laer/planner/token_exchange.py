"""Prices of token exchanges, and the choice of `--fsep-token-exchange auto`.

The cost model counts pairs of tokens and experts. Rows per pair depend on the experts that tokens
choose together; they are estimated once, for even counts.

Legend: N ranks, E experts, S slots, T tokens of a rank, K top-k; X sampled ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding, TokenExchange
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices

# Sampled ranks: even counts make ranks much alike, and all would take time in N².
_RANKS = 16


def choose_token_exchange(
    costs: CostModel, geometry: Geometry, top_k: int, tokens: int
) -> TokenExchange:
    """Choose the exchange with less predicted token time; of equals Megatron's."""
    seconds = token_seconds(costs, geometry, top_k, tokens)
    return min(TokenExchange, key=lambda exchange: seconds[exchange])


def token_seconds(
    costs: CostModel, geometry: Geometry, top_k: int, tokens: int
) -> dict[TokenExchange, float]:
    """Predict the seconds of a layer's token exchanges, forward and backward, with even counts.

    `rank` drives both link classes at once, so the slower one counts; `node` runs one stage after
    the other. `node` also has the latencies of its second stage, of the data that accompanies rows
    and of the wait for sizes (`TokenPrices.latency_seconds`). Kernels are not priced: both gather
    and sum as many pairs.
    """
    cluster, seconds = costs.cluster, {}
    for exchange, rows in _crossings(geometry, top_k, tokens).items():
        prices = TokenPrices(exchange)
        intra_s = rows.intra * (costs.token_bytes / cluster.intra.bytes_per_s)
        inter_s = rows.inter * (costs.token_bytes / cluster.inter.bytes_per_s)
        pass_s = intra_s + inter_s if prices.in_stages else max(intra_s, inter_s)
        pass_s += replace(costs, tokens=prices).token_latency_seconds(geometry)
        seconds[exchange] = costs.token_passes * pass_s
    return seconds


def with_token_exchange(
    costs: CostModel, exchange: TokenExchange, geometry: Geometry, top_k: int, tokens: int
) -> CostModel:
    """Return the cost model with the token prices of this exchange, and the number of pairs."""
    prices = BY_RANK
    if exchange == TokenExchange.NODE:
        crossings = _crossings(geometry, top_k, tokens)
        pairs, rows = crossings[TokenExchange.RANK], crossings[TokenExchange.NODE]
        leaving_pairs = pairs.intra + pairs.inter
        prices = TokenPrices(
            exchange,
            rows.intra / leaving_pairs if leaving_pairs else 1.0,
            rows.inter / pairs.inter if pairs.inter else 1.0,
        )
    return replace(costs, tokens=prices, pairs_per_rank=tokens * top_k)


@dataclass(frozen=True)
class _Rows:
    """An average rank's rows inside nodes and between them."""

    intra: float
    inter: float


def _crossings(geometry: Geometry, top_k: int, tokens: int) -> dict[TokenExchange, _Rows]:
    """Estimate an average rank's rows by exchange, for equally likely experts."""
    num_ranks, num_experts = geometry.num_ranks, geometry.num_experts
    if tokens < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{tokens} tokens with {top_k} of {num_experts} experts each: give at least one token, "
            f"and 1..{num_experts} experts of a token"
        )
    # Dealt out in turn, so that no expert has more tokens than there are.
    share, left = divmod(tokens * top_k, num_experts)
    counts_NE = np.full((num_ranks, num_experts), share, dtype=np.int64)
    extra_N1 = np.arange(num_ranks)[:, None] * left
    counts_NE += (np.arange(num_experts) - extra_N1) % num_experts < left
    layout = geometry.static_layout
    if geometry.sharding == Sharding.ROWS:  # at home, even counts need no replica
        layout = construct_layout(counts_NE, layout, geometry.node_size)
    return _expected_crossings(counts_NE, layout, geometry.node_size, tokens)


def _expected_crossings(
    counts_NE: Int64, layout: ExpertLayout, node_size: int, tokens: int
) -> dict[TokenExchange, _Rows]:
    """Estimate the rows of an average rank's tokens by exchange, from sampled ranks.

    A row of `node` that is passed on counts for its source.
    """
    quotas = exact_split(layout, node_size).solve(counts_NE)
    rank_X = np.unique(np.linspace(0, layout.num_ranks - 1, _RANKS).astype(np.int64))
    row_XS = np.stack([quotas.rank_row(rank) for rank in rank_X.tolist()])
    rank_N = np.arange(layout.num_ranks)
    rank_S = np.repeat(rank_N, layout.capacity)
    pairs_XN = row_XS.reshape(len(rank_X), layout.num_ranks, -1).sum(axis=2)
    tokens_X = np.full(len(rank_X), tokens)
    expected = [
        expected_tokens(
            row_XS, tokens_X, layout.slot_expert_S, rank_S // size, layout.num_ranks // size
        )
        for size in (1, node_size)
    ]
    is_near_XN = rank_X[:, None] // node_size == rank_N // node_size
    is_own_XN = rank_X[:, None] == rank_N
    is_passed_on_XN = rank_X[:, None] % node_size != rank_N % node_size
    is_home_XM = rank_X[:, None] // node_size == np.arange(layout.num_ranks // node_size)
    return {
        TokenExchange.RANK: _Rows(
            float(pairs_XN[is_near_XN & ~is_own_XN].sum()) / len(rank_X),
            float(pairs_XN[~is_near_XN].sum()) / len(rank_X),
        ),
        TokenExchange.NODE: _Rows(
            float(expected[0][is_passed_on_XN].sum()) / len(rank_X),
            float(expected[1][~is_home_XM].sum()) / len(rank_X),
        ),
    }


def expected_tokens(
    quota_NS: Int64,
    tokens_N: Int64,
    expert_S: npt.NDArray[np.int16],
    place_S: Int64,
    num_places: int,
) -> npt.NDArray[np.float64]:
    """Return the expected distinct tokens of each source for each place, a node or a rank."""
    filled_F = np.flatnonzero(expert_S != EMPTY)
    quota_NS, expert_S, place_S = quota_NS[:, filled_F], expert_S[filled_F], place_S[filled_F]
    # A token goes to one slot of an expert, so slots of one expert and place add up.
    keys_X, at_S = np.unique(place_S * (int(expert_S.max()) + 1) + expert_S, return_inverse=True)
    share_NX = np.zeros((len(quota_NS), len(keys_X)))
    np.add.at(share_NX.T, at_S, (quota_NS / np.maximum(tokens_N, 1)[:, None]).T)
    place_X = keys_X // (int(expert_S.max()) + 1)
    missed_NB = np.ones((len(quota_NS), num_places))
    np.multiply.at(missed_NB.T, place_X, 1 - np.minimum(share_NX, 1.0).T)
    expected: npt.NDArray[np.float64] = tokens_N[:, None] * (1 - missed_NB)
    return expected
