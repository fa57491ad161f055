"""The token → slot map says which replica of an expert serves a token; this is the torch reference.

Runs no collective and makes no choice: how many tokens go to each slot was decided by the quotas.

Legend: T tokens, E experts, S slots.
"""

from __future__ import annotations

import torch


def to_slots(
    probs_TE: torch.Tensor,
    routing_map_TE: torch.Tensor,
    slot_expert_S: torch.Tensor,
    ranges_2S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Translate the router's output from experts to slots.

    Deterministic: no atomics, so the same token always goes to the same replica. The gradient of
    the probabilities flows back to the experts; a (token, expert) pair has exactly one slot, so its
    sum over replicas has one term.

    Args:
        probs_TE: routing probabilities.
        routing_map_TE: bool, which experts each token goes to.
        slot_expert_S: int64, the expert in each slot.
        ranges_2S: from `permutation.slot_ranges`, integers on the same device.

    Returns:
        probs_TS and the bool map [T, S].
    """
    # Along the inner dimension, whose scan is parallel on CUDA; the other one's walks all tokens.
    place_TE = torch.cumsum(routing_map_TE.t().contiguous(), dim=1, dtype=torch.int32).t() - 1
    place_TS = place_TE.index_select(1, slot_expert_S)
    routed_TS = routing_map_TE.index_select(1, slot_expert_S)
    slot_map_TS = routed_TS & (place_TS >= ranges_2S[0]) & (place_TS < ranges_2S[1])
    probs_TS = probs_TE.index_select(1, slot_expert_S).masked_fill(~slot_map_TS, 0)
    return probs_TS, slot_map_TS
