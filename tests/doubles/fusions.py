"""Fused permutations and routers of Transformer Engine, and apex's fused gradient accumulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import layers
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


@contextlib.contextmanager
def fused_accumulation() -> Iterator[None]:
    """Replace apex's extension, with a product and an addition."""

    def add(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad_output.t() @ total_input)

    extension = SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)
    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", extension, create=True),
    ):
        yield


def mark_added(weight: Any, grad: torch.Tensor) -> torch.Tensor:
    """Mark a weight's gradient as added by its product; return one for autograd, full of NaN."""
    weight.grad_added_to_main_grad = True
    return torch.full_like(grad, torch.nan)
