"""Back end `loop`: one `torch.mm` per slot.

Legend: C slots, T tokens received, R output features (rows), K input features (columns), n tokens
of one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.runtime.comm.memory import poison


class Loop(SlotGemm):
    """`SlotGemm` that writes every product in place, so that nothing is stacked."""

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        return _products(input_TK, weight_CRK.transpose(1, 2), tokens_C)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        return _products(grad_TR, weight_CRK, tokens_C)

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        grads, inputs = _by_slot(grad_TR, tokens_C), _by_slot(kept_TK, tokens_C)
        for grad_nR, input_nK, out_RK in zip(grads, inputs, out_CRK.unbind(), strict=True):
            _write_product(grad_nR.t(), input_nK, out_RK)


def _by_slot(rows_TX: torch.Tensor, tokens_C: Sequence[int]) -> Sequence[torch.Tensor]:
    return torch.split_with_sizes(rows_TX, list(tokens_C))


def _products(
    rows_TX: torch.Tensor, matrix_CXY: torch.Tensor, tokens_C: Sequence[int]
) -> torch.Tensor:
    """Multiply each slot's rows by its matrix; X and Y are R and K or the reverse."""
    out_TY = poison(rows_TX.new_empty(rows_TX.shape[0], matrix_CXY.shape[2]))
    slots = _by_slot(rows_TX, tokens_C), matrix_CXY.unbind(), _by_slot(out_TY, tokens_C)
    for rows_nX, matrix_XY, out_nY in zip(*slots, strict=True):
        torch.mm(rows_nX, matrix_XY, out=out_nY)
    return out_TY


def _write_product(grad_Rn: torch.Tensor, input_nK: torch.Tensor, out_RK: torch.Tensor) -> None:
    """Write one slot's product, in the output's dtype without a rounding in between."""
    if not len(input_nK):
        out_RK.zero_()
        return
    options: dict[str, Any] = {}
    if out_RK.dtype != input_nK.dtype:
        if out_RK.is_cuda:
            options["out_dtype"] = out_RK.dtype
        else:  # torch has no such product on the CPU
            grad_Rn, input_nK = grad_Rn.to(out_RK.dtype), input_nK.to(out_RK.dtype)
    torch.mm(grad_Rn, input_nK, out=out_RK, **options)


GEMM: SlotGemm = Loop()
