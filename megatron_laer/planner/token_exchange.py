"""`--fsep-token-exchange auto` is decided here."""

from __future__ import annotations

from megatron_laer.choices import TokenExchange
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry


def choose_token_exchange(
    costs: CostModel, geometry: Geometry, top_k: int, tokens: int
) -> TokenExchange:
    """Choose the exchange through nodes where there are several, and a token has several experts.

    Args:
        costs: of the layer.
        top_k: experts of a token.
        tokens: of a rank and microbatch.
    """
    pays = geometry.num_nodes > 1 and top_k > 1
    return TokenExchange.NODE if pays else TokenExchange.RANK
