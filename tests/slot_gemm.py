"""The reference that every GEMM back end is compared with: a linear layer per slot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from megatron_laer.experts.gemm import slot_gemm
from megatron_laer.experts.slot_linear import SlotLinear

# Slots without tokens at both ends and between, one token, and more than a tile.
TOKENS_C = [0, 300, 0, 7, 1, 129, 0]
ROWS, COLUMNS = 64, 32


class FixedWeights:
    """Lends a matrix that stays where it is, and memory for its gradient that is not empty."""

    def __init__(self, weight_CRK: torch.Tensor) -> None:
        self._weight_CRK = weight_CRK

    def matrix(self, position: int) -> torch.Tensor:
        return self._weight_CRK

    def new_grad(self, position: int) -> torch.Tensor:
        return torch.full_like(self._weight_CRK, float("nan"))


def check_back_end(
    name: str, dtype: torch.dtype, device: torch.device, tokens_C: Sequence[int] = TOKENS_C
) -> None:
    """Compare output and gradients of `SlotLinear` on this back end with the reference."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    weight_CRK = torch.randn(len(tokens_C), ROWS, COLUMNS, **options).requires_grad_()
    input_TK = torch.randn(sum(tokens_C), COLUMNS, **options).requires_grad_()
    grad_TR = torch.randn(sum(tokens_C), ROWS, **options)

    linear = SlotLinear(COLUMNS, ROWS, position=0, init_method=None, gemm=slot_gemm(name))
    linear.bind(weight_CRK, FixedWeights(weight_CRK.detach()), list(tokens_C))
    output_TR, bias = linear(input_TK)
    found = torch.autograd.grad(output_TR, (input_TK, weight_CRK), grad_TR)

    expected_TR = torch.cat(
        [
            torch.nn.functional.linear(input_TK[start:end], weight_CRK[slot])
            for slot, (start, end) in enumerate(pairwise(accumulate(tokens_C, initial=0)))
        ]
    )
    expected = torch.autograd.grad(expected_TR, (input_TK, weight_CRK), grad_TR)
    assert bias is None
    torch.testing.assert_close(output_TR, expected_TR)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
