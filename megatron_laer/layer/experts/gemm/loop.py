"""Back end `loop`: one `torch.mm` per slot.

Legend: C slots, T tokens received, R output features (rows), K input features (columns), n tokens
of one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate as running_sums
from itertools import pairwise
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm


class Loop(SlotGemm):
    """`SlotGemm` that writes every product in place, so that nothing is stacked."""

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        output_TR = input_TK.new_empty(input_TK.shape[0], weight_CRK.shape[1])
        for slot, rows in _spans(tokens_C):
            torch.mm(input_TK[rows], weight_CRK[slot].t(), out=output_TR[rows])
        return output_TR

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        grad_TK = grad_TR.new_empty(grad_TR.shape[0], weight_CRK.shape[2])
        for slot, rows in _spans(tokens_C):
            torch.mm(grad_TR[rows], weight_CRK[slot], out=grad_TK[rows])
        return grad_TK

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        for slot, rows in _spans(tokens_C):
            _write_product(grad_TR[rows].t(), kept_TK[rows], out_CRK[slot])


def _spans(tokens_C: Sequence[int]) -> Iterable[tuple[int, slice]]:
    ends = running_sums(tokens_C, initial=0)
    return enumerate(slice(start, end) for start, end in pairwise(ends))


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
