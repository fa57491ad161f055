"""Linear layer over restored experts, in autograd, and its bias.

The GEMMs are a back end's (`experts.gemm`), the activation between two layers is Megatron's own
(`experts.module`). No collective is run and no weight freed here.

Legend: C slots, T tokens received, R output features (rows), K input features (columns), n tokens
of one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.runtime.weights.restored import RestoredExperts


def slot_linear(
    input_TK: torch.Tensor,
    placeholder_CRK: torch.Tensor,
    experts: RestoredExperts,
    position: int,
    tokens_C: Sequence[int],
    gemm: SlotGemm,
) -> torch.Tensor:
    """Multiply each slot's tokens by the slot's matrix."""
    output_TR: torch.Tensor = _SlotLinear.apply(
        input_TK, placeholder_CRK, experts, position, tokens_C, gemm
    )
    return output_TR


def slot_bias(
    output_TR: torch.Tensor,
    scale_T: torch.Tensor | None,
    placeholder_CR: torch.Tensor,
    experts: RestoredExperts,
    position: int,
    tokens_C: Sequence[int],
) -> torch.Tensor:
    """Add each slot's bias, times `scale_T` if given, to its tokens' output, in place."""
    biased_TR: torch.Tensor = _SlotBias.apply(
        output_TR, scale_T, placeholder_CR, experts, position, tokens_C
    )
    return biased_TR


class _SlotLinear(torch.autograd.Function):
    """`F.linear` of each slot's tokens with the slot's matrix, a placeholder in autograd's graph.

    Forward and backward request the matrices separately, so that they can be freed in between. All
    slots' weight gradients are written to the one `[C, R, K]` buffer that is exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_TK: torch.Tensor,
        placeholder_CRK: torch.Tensor,
        experts: RestoredExperts,
        position: int,
        tokens_C: Sequence[int],
        gemm: SlotGemm,
    ) -> torch.Tensor:
        output_TR = gemm.forward(input_TK, experts.weights.matrix(position), tokens_C)
        kept = gemm.kept(input_TK, tokens_C) if ctx.needs_input_grad[1] else None
        is_tensor = isinstance(kept, torch.Tensor)
        ctx.save_for_backward(kept if is_tensor else None)
        ctx.quantised = None if is_tensor else kept
        ctx.experts, ctx.position, ctx.tokens_C, ctx.gemm = experts, position, tokens_C, gemm
        return output_TR

    @staticmethod
    def backward(ctx: Any, grad_TR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept_TK,) = ctx.saved_tensors
        gemm, experts, position, tokens_C = ctx.gemm, ctx.experts, ctx.position, ctx.tokens_C
        input_needs, weight_needs = ctx.needs_input_grad[:2]
        grad_input_TK = grad_weight_CRK = None
        if input_needs:
            grad_input_TK = gemm.input_grad(
                grad_TR, experts.backward_weights.matrix(position, "backward"), tokens_C
            )
        if weight_needs:
            kept = ctx.quantised if kept_TK is None else kept_TK
            compute = partial(gemm.weight_grad, grad_TR, kept, tokens_C)
            grad_weight_CRK = experts.weight_grads(position, compute)
        return grad_input_TK, grad_weight_CRK, None, None, None, None


class _SlotBias(torch.autograd.Function):
    """Sum of output and the slots' biases, slot by slot; their gradients are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        output_TR: torch.Tensor,
        scale_T: torch.Tensor | None,
        placeholder_CR: torch.Tensor,
        experts: RestoredExperts,
        position: int,
        tokens_C: Sequence[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(scale_T)
        ctx.experts, ctx.position, ctx.tokens_C = experts, position, tokens_C
        ctx.mark_dirty(output_TR)
        for output_nR, bias_R, scale_n1 in zip(
            output_TR.split(list(tokens_C)),
            experts.weights.matrix(position).flatten(1),
            _scales(scale_T, tokens_C),
            strict=True,
        ):
            output_nR += bias_R if scale_n1 is None else bias_R * scale_n1
        return output_TR

    @staticmethod
    def backward(ctx: Any, grad_TR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale_T,) = ctx.saved_tensors
        experts, position, tokens_C = ctx.experts, ctx.position, ctx.tokens_C
        _, scale_needs, bias_needs = ctx.needs_input_grad[:3]
        grads = grad_TR.split(list(tokens_C))
        grad_scale_T = grad_bias_CR = None
        if scale_needs:
            bias_CR = experts.backward_weights.matrix(position, "backward").flatten(1)
            products = (
                grad_nR.to(scale_T.dtype) @ bias_R1.to(scale_T.dtype)
                for grad_nR, bias_R1 in zip(grads, bias_CR.unsqueeze(2), strict=True)
            )
            grad_scale_T = torch.cat(list(products)).squeeze(1)
        if bias_needs:
            grad_bias_CR = experts.grads.new(position)
            for out_R, grad_nR, scale_n1 in zip(
                grad_bias_CR.flatten(1), grads, _scales(scale_T, tokens_C), strict=True
            ):
                scaled_nR = grad_nR if scale_n1 is None else grad_nR * scale_n1
                out_R.copy_(scaled_nR.sum(0, dtype=torch.float32))
        return grad_TR, grad_scale_T, grad_bias_CR, None, None, None


def _scales(scale_T: torch.Tensor | None, tokens_C: Sequence[int]) -> Sequence[torch.Tensor | None]:
    if scale_T is None:
        return [None] * len(tokens_C)
    return torch.split(scale_T.unsqueeze(1), list(tokens_C))
