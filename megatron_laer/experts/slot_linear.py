"""`SlotLinear` stands for a linear layer over restored experts, in autograd and Megatron's MLP.

The GEMMs are a back end's (`experts.gemm`), the activation between the two layers is Megatron's own
(see `experts.module`). Nothing here runs a collective or frees a weight.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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


class _Bound(NamedTuple):
    """Holds the weights of one forward call, and how many of the input's rows each slot has."""

    placeholder_CRK: torch.Tensor
    weights: SlotWeights
    tokens_C: Sequence[int]


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


class SlotLinear(torch.nn.Module):
    """Stands where Megatron's MLP expects a linear layer; owns no parameter.

    `bind` gives it the weights of one forward call, `unbind` takes them away.
    """

    def __init__(
        self, input_size: int, output_size: int, *, position: int, init_method: Any, gemm: SlotGemm
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.position = position
        self.init_method = init_method
        self._gemm = gemm
        self._bound: _Bound | None = None

    def bind(
        self, placeholder_CRK: torch.Tensor, weights: SlotWeights, tokens_C: Sequence[int]
    ) -> None:
        """Use these slots' weights; the input's rows are sorted by slot, `tokens_C[c]` each."""
        self._bound = _Bound(placeholder_CRK, weights, tokens_C)

    def unbind(self) -> None:
        """Forget the weights, so that they can be freed."""
        self._bound = None

    def forward(self, input_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the output, and by Megatron's convention a bias, which is None."""
        assert self._bound is not None, "SlotLinear called without weights"
        placeholder_CRK, weights, tokens_C = self._bound
        output_TR = _SlotLinear.apply(
            input_TK, placeholder_CRK, weights, self.position, tokens_C, self._gemm
        )
        return output_TR, None
