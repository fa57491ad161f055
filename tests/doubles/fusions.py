"""Transformer Engine's fused permutations and routers, by Megatron's unfused functions."""

from typing import Any

from megatron.core.transformer.moe import moe_utils


def give_to_megatron() -> None:
    """Provide these functions to Megatron's MoE layers without Transformer Engine."""
    if moe_utils.HAVE_TE:
        return
    moe_utils.HAVE_TE = True
    moe_utils.fused_permute = lambda *tokens, **sizes: moe_utils.permute(*tokens, **sizes)[0:3:2]
    moe_utils.fused_permute_with_probs = _permute_with_probs
    moe_utils.fused_unpermute = _unpermute
    moe_utils.fused_sort_chunks_by_index = lambda *by: moe_utils.sort_chunks_by_idxs(*by)[0]
    moe_utils.fused_sort_chunks_by_index_with_probs = _sort_chunks_with_probs
    moe_utils.fused_topk_with_score_function = moe_utils.topk_routing_with_score_function
    moe_utils.fused_compute_score_for_moe_aux_loss = moe_utils.compute_routing_scores_for_aux_loss
    moe_utils.fused_moe_aux_loss = _aux_loss


def _permute_with_probs(tokens: Any, probs: Any, routing_map: Any, **sizes: Any) -> Any:
    return moe_utils.permute(tokens, routing_map, probs=probs, **sizes)[:3]


def _unpermute(tokens: Any, order: Any, merging_probs: None, restore_shape: Any) -> Any:
    """Return the tokens in their original order, with a token's rows added up."""
    return moe_utils.unpermute(tokens, order, restore_shape, probs=merging_probs)


def _sort_chunks_with_probs(tokens: Any, probs: Any, *by: Any) -> Any:
    return moe_utils.sort_chunks_by_idxs(tokens, *by, probs=probs)


def _aux_loss(*, coeff: float, **settings: Any) -> Any:
    return moe_utils.switch_load_balancing_loss_func(moe_aux_loss_coeff=coeff, **settings)
