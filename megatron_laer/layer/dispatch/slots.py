"""Map of tokens to slots: the replica that serves each token's expert, in torch.

It has a column for each slot (`to_slots`), or one for each choice of the router (`to_choices`). The
quotas have decided how many tokens go to each slot. No collective is run.

Legend: T tokens, E experts, S slots, K top-k, P (token, expert) pairs.
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
    the probabilities flows back to the experts, as one term per (token, expert) pair.

    Args:
        slot_expert_S: int64, the expert in each slot.
        ranges_2S: from `permutation.slot_ranges`, integers on the same device.

    Returns:
        probs_TS and the bool map [T, S].
    """
    # A scan along the inner dimension is parallel on CUDA; the other one walks all tokens.
    place_TE = torch.cumsum(routing_map_TE.t().contiguous(), dim=1, dtype=torch.int32).t() - 1
    place_TS = place_TE.index_select(1, slot_expert_S)
    routed_TS = routing_map_TE.index_select(1, slot_expert_S)
    slot_map_TS = routed_TS & (place_TS >= ranges_2S[0]) & (place_TS < ranges_2S[1])
    probs_TS = probs_TE.index_select(1, slot_expert_S).masked_fill(~slot_map_TS, 0)
    return probs_TS, slot_map_TS


def to_choices(
    probs_TE: torch.Tensor,
    routing_map_TE: torch.Tensor,
    top_k: int,
    by_expert_S: torch.Tensor,
    tokens_S: torch.Tensor,
    num_pairs: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Translate the router's output to the slots that each token goes to, as `to_slots` does.

    The map decides, so a pair of probability 0 has a slot too. The host does not wait for the
    device.

    Args:
        by_expert_S: the slots sorted by expert.
        tokens_S: in that order, the number of this rank's tokens that each slot serves.
        num_pairs: P, the sum of these.

    Returns:
        probs_TK and the int64 slots [T, K], which are -1 where a token has fewer.
    """
    num_tokens, num_experts = routing_map_TE.shape
    slot_P = torch.repeat_interleave(by_expert_S, tokens_S, output_size=num_pairs)
    slot_ET = slot_P.new_full((num_experts, num_tokens), -1)
    slot_ET.masked_scatter_(routing_map_TE.t(), slot_P)
    slot_TK, expert_TK = slot_ET.t().topk(top_k, dim=1)
    probs_TK = probs_TE.gather(1, expert_TK).masked_fill(slot_TK < 0, 0)
    return probs_TK, slot_TK.long()
