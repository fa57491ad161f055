"""`slot_linear` is a linear layer over restored experts, in autograd.

The GEMMs are a back end's (`experts.gemm`), the activation between two layers is Megatron's own
(see `experts.module`). Nothing here runs a collective or frees a weight.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron_laer.experts.gemm import SlotGemm


class SlotWeights(Protocol):
    """Lends whole weights while something computes with them: `RestoredExperts`."""

    def matrix(self, position: int) -> torch.Tensor:
        """Return the matrix `[C, R, K]` of the layer at this position."""
        ...

    def new_grad(self, position: int) -> torch.Tensor:
        """Return uninitialised memory for the matrix's gradient."""
        ...


def slot_linear(
    input_TK: torch.Tensor,
    placeholder_CRK: torch.Tensor,
    weights: SlotWeights,
    position: int,
    tokens_C: Sequence[int],
    gemm: SlotGemm,
) -> torch.Tensor:
    """Multiply each slot's tokens with the slot's matrix.

    Args:
        input_TK: tokens sorted by slot.
        placeholder_CRK: stands for the matrices in autograd's graph.
        weights: lends the matrices.
        position: of the layer among the expert's layers.
        tokens_C: how many of the input's rows each slot has.

    Returns:
        [T, R].
    """
    output_TR: torch.Tensor = _SlotLinear.apply(
        input_TK, placeholder_CRK, weights, position, tokens_C, gemm
    )
    return output_TR


class _SlotLinear(torch.autograd.Function):
    """Computes `F.linear` of each slot's tokens with the slot's matrix.

    It asks for the matrices in forward and again in backward, so that they can be freed in between;
    the placeholder stands for them in autograd's graph. All slots' weight gradients are written
    into the one `[C, R, K]` buffer that is exchanged; separate `F.linear` calls would leave C
    tensors to be stacked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_TK: torch.Tensor,
        placeholder_CRK: torch.Tensor,
        weights: SlotWeights,
        position: int,
        tokens_C: Sequence[int],
        gemm: SlotGemm,
    ) -> torch.Tensor:
        ctx.save_for_backward(input_TK)
        ctx.weights, ctx.position, ctx.tokens_C, ctx.gemm = weights, position, tokens_C, gemm
        return gemm.forward(input_TK, weights.matrix(position), tokens_C)

    @staticmethod
    def backward(ctx: Any, grad_TR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input_TK,) = ctx.saved_tensors
        gemm, weights, position, tokens_C = ctx.gemm, ctx.weights, ctx.position, ctx.tokens_C
        input_needs, weight_needs = ctx.needs_input_grad[:2]
        grad_input_TK = grad_weight_CRK = None
        if input_needs:
            grad_input_TK = gemm.input_grad(grad_TR, weights.matrix(position), tokens_C)
        if weight_needs:
            grad_weight_CRK = weights.new_grad(position)
            gemm.weight_grad(grad_TR, input_TK, tokens_C, grad_weight_CRK)
        return grad_input_TK, grad_weight_CRK, None, None, None, None
