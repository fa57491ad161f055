"""Prices of token exchanges, and the choice of `--fsep-token-exchange auto`.

The cost model counts pairs of tokens and experts. Rows per pair depend on the experts that tokens
choose together; they are estimated once, for even counts.

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_laer.choices import Dispatch, Sharding, TokenExchange
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices


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
        prices = TokenPrices(Dispatch(exchange))
        intra_s = rows.intra * (costs.token_bytes / cluster.intra.bytes_per_s)
        inter_s = rows.inter * (costs.token_bytes / cluster.inter.bytes_per_s)
        pass_s = intra_s + inter_s if prices.in_stages else max(intra_s, inter_s)
        pass_s += replace(costs, tokens=prices).token_latency_seconds(geometry)
        seconds[exchange] = costs.token_passes * pass_s
    return seconds


def with_token_exchange(
    costs: CostModel, dispatch: Dispatch, geometry: Geometry, top_k: int, tokens: int
) -> CostModel:
    """Return the cost model with the token prices of this dispatch, and the number of pairs."""
    prices = BY_RANK
    if dispatch != Dispatch.RANK:
        crossings = _crossings(geometry, top_k, tokens)
        pairs, rows = crossings[TokenExchange.RANK], crossings[TokenExchange.NODE]
        leaving_pairs = pairs.intra + pairs.inter
        prices = TokenPrices(
            dispatch,
            rows.intra / leaving_pairs if leaving_pairs else 1.0,
            rows.inter / pairs.inter if pairs.inter else 1.0,
        )
    return replace(costs, tokens=prices, pairs_per_rank=tokens * top_k, tokens_per_rank=tokens)


@dataclass(frozen=True)
class _Rows:
    """An average rank's rows inside nodes and between them."""

    intra: float
    inter: float


def _crossings(geometry: Geometry, top_k: int, tokens: int) -> dict[TokenExchange, _Rows]:
    """Estimate an average rank's rows by exchange, for experts that are chosen independently.

    All experts are equally likely. A rank keeps the pairs of its own ones, and a node those of its
    ranks'. Ranks elsewhere have equal parts of the others. A row of `node` that is passed on counts
    for its source.
    """
    num_experts, size, far_nodes = geometry.num_experts, geometry.node_size, geometry.num_nodes - 1
    if tokens < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{tokens} tokens with {top_k} of {num_experts} experts each: give at least one token, "
            f"and 1..{num_experts} experts of a token"
        )
    own, near = _experts_held(geometry)
    far = num_experts - near

    def rows(experts: float, places: int) -> float:
        """Expect the rows to places that have equal parts of these experts: distinct tokens."""
        missed: float = (1.0 - top_k / num_experts) ** (experts / max(places, 1))
        return places * tokens * (1.0 - missed)

    pairs = tokens * top_k / num_experts
    passed_on = rows(near - own, size - 1) + rows(far, far_nodes * size) * (size - 1) / size
    return {
        TokenExchange.RANK: _Rows((near - own) * pairs, far * pairs),
        TokenExchange.NODE: _Rows(passed_on, rows(far, far_nodes)),
    }


def _experts_held(geometry: Geometry) -> tuple[float, float]:
    """Return the mean numbers of experts on a rank and on a node, for even counts."""
    layout, num_ranks = geometry.static_layout, geometry.num_ranks
    if geometry.sharding == Sharding.ROWS:  # at home, even counts need no replica
        even_NE = np.ones((num_ranks, geometry.num_experts), dtype=np.int64)
        layout = construct_layout(even_NE, layout, geometry.node_size)
    slots_NC = layout.slot_expert_S.reshape(num_ranks, -1)
    filled = [
        [len({*of.tolist()} - {EMPTY}) for of in slots_NC.reshape(places, -1)]
        for places in (num_ranks, geometry.num_nodes)
    ]
    own, near = map(np.mean, filled)
    return float(own), float(near)
