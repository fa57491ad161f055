"""Transformer Engine's fused permutations and routers, by Megatron's unfused functions."""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils


def give_to_megatron() -> None:
    """Provide these functions to Megatron's MoE layers without Transformer Engine."""
    if moe_utils.HAVE_TE:
        return
    moe_utils.HAVE_TE = True
    moe_utils.fused_permute = permute
    moe_utils.fused_permute_with_probs = permute_with_probs
    moe_utils.fused_unpermute = unpermute
    moe_utils.fused_sort_chunks_by_index = sort_chunks
    moe_utils.fused_sort_chunks_by_index_with_probs = sort_chunks_with_probs
    moe_utils.fused_topk_with_score_function = moe_utils.topk_routing_with_score_function
    moe_utils.fused_compute_score_for_moe_aux_loss = moe_utils.compute_routing_scores_for_aux_loss
    moe_utils.fused_moe_aux_loss = aux_loss


def permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int | None = None
) -> tuple[Any, Any]:
    found = moe_utils.permute(tokens, routing_map, num_out_tokens=num_out_tokens)
    return found[0], found[2]


def permute_with_probs(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int | None = None,
) -> tuple[Any, Any, Any]:
    found = moe_utils.permute(tokens, routing_map, probs=probs, num_out_tokens=num_out_tokens)
    return found[0], found[1], found[2]


def unpermute(
    tokens: torch.Tensor,
    order: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: torch.Size | None = None,
) -> Any:
    """Return the tokens in their original order, with a token's rows added up."""
    assert merging_probs is None, "Megatron's dispatchers leave probabilities to the experts"
    return moe_utils.unpermute(tokens, order, restore_shape)


def sort_chunks(tokens: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor) -> Any:
    return moe_utils.sort_chunks_by_idxs(tokens, sizes, order)[0]


def sort_chunks_with_probs(
    tokens: torch.Tensor, probs: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor
) -> Any:
    return moe_utils.sort_chunks_by_idxs(tokens, sizes, order, probs=probs)


def aux_loss(*, coeff: float, **settings: Any) -> Any:
    return moe_utils.switch_load_balancing_loss_func(moe_aux_loss_coeff=coeff, **settings)
