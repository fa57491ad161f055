"""The back end `loop` goes over the slots, with one `torch.mm` for each.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch

from megatron_laer.experts.gemm import SlotGemm


class _Loop:
    """Implements `SlotGemm`; every product is written where it belongs, so nothing is stacked."""

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        output_TR = input_TK.new_empty(input_TK.shape[0], weight_CRK.shape[1])
        for slot, (start, end) in _spans(tokens_C):
            torch.mm(input_TK[start:end], weight_CRK[slot].t(), out=output_TR[start:end])
        return output_TR

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        grad_TK = grad_TR.new_empty(grad_TR.shape[0], weight_CRK.shape[2])
        for slot, (start, end) in _spans(tokens_C):
            torch.mm(grad_TR[start:end], weight_CRK[slot], out=grad_TK[start:end])
        return grad_TK

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        input_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        for slot, (start, end) in _spans(tokens_C):
            torch.mm(grad_TR[start:end].t(), input_TK[start:end], out=out_CRK[slot])


def _spans(tokens_C: Sequence[int]) -> Iterable[tuple[int, tuple[int, int]]]:
    """Return each slot with the rows [start, end) of its tokens."""
    return enumerate(pairwise(accumulate(tokens_C, initial=0)))


GEMM: SlotGemm = _Loop()
