"""The reference of every GEMM back end: a linear layer per slot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.layer.experts.slot_linear import slot_linear

# Slots without tokens at both ends and between, one token, and more than a tile.
TOKENS_C = [0, 300, 0, 7, 1, 129, 0]
SPLITS = {"some": TOKENS_C, "none": [0, 0, 0], "one slot": [5], "all in one": [0, 0, 64, 0]}
ROWS, COLUMNS = 64, 32


def fixed_experts(
    weight_CRK: torch.Tensor,
    grad_like: torch.Tensor | None = None,
    backward_weight_CRK: torch.Tensor | None = None,
) -> Any:
    """Make experts with a fixed matrix, whose new memory for gradients is not empty."""
    in_backward = weight_CRK if backward_weight_CRK is None else backward_weight_CRK

    def new(_: int) -> torch.Tensor:
        return torch.full_like(weight_CRK if grad_like is None else grad_like, float("nan"))

    def weight_grads(position: int, compute: Callable[[torch.Tensor], None]) -> torch.Tensor:
        grad_CRK = new(position)
        compute(grad_CRK)
        return grad_CRK

    return SimpleNamespace(
        weights=SimpleNamespace(matrix=lambda *_: weight_CRK),
        backward_weights=SimpleNamespace(matrix=lambda *_: in_backward),
        grads=SimpleNamespace(new=new),
        weight_grads=weight_grads,
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, which shows elements that a back end did not write."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def check_back_end(
    gemm: SlotGemm, dtype: torch.dtype, device: torch.device, tokens_C: Sequence[int] = TOKENS_C
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    weight_CRK = torch.randn(len(tokens_C), ROWS, COLUMNS, **options).requires_grad_()
    input_TK = torch.randn(sum(tokens_C), COLUMNS, **options).requires_grad_()
    grad_TR = torch.randn(sum(tokens_C), ROWS, **options)

    experts = fixed_experts(weight_CRK.detach())
    with poisoned_memory():
        output_TR = slot_linear(input_TK, weight_CRK, experts, 0, list(tokens_C), gemm)
        found = torch.autograd.grad(output_TR, (input_TK, weight_CRK), grad_TR)

    expected_TR = torch.cat(
        [
            torch.nn.functional.linear(input_TK[start:end], weight_CRK[slot])
            for slot, (start, end) in enumerate(_spans(tokens_C))
        ]
    )
    expected = torch.autograd.grad(expected_TR, (input_TK, weight_CRK), grad_TR)
    torch.testing.assert_close(output_TR, expected_TR)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def check_weight_grad(
    gemm: SlotGemm,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: torch.device,
    tokens_C: Sequence[int] = TOKENS_C,
) -> None:
    """Compare weight gradients with products in float64.

    The output gradients are expanded, as a sum's are.
    """
    generator = torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    input_TK = torch.randn(sum(tokens_C), COLUMNS, **options)
    grad_TR = torch.randn(1, ROWS, **options).expand(sum(tokens_C), ROWS)
    expected_CRK = torch.stack(
        [
            grad_TR[start:end].double().t() @ input_TK[start:end].double()
            for start, end in _spans(tokens_C)
        ]
    )
    shape = (len(tokens_C), ROWS, COLUMNS)
    out_CRK = torch.full(shape, float("nan"), dtype=out_dtype, device=device)
    # In float32 nothing is rounded to bfloat16 on the way, so only the order of sums differs.
    bound = 2e-5 if out_dtype == torch.float32 else 2e-2
    with poisoned_memory():
        gemm.weight_grad(grad_TR, input_TK, tokens_C, out_CRK)
    torch.testing.assert_close(out_CRK.double(), expected_CRK, rtol=bound, atol=10 * bound)
    assert not out_CRK[[slot for slot, tokens in enumerate(tokens_C) if not tokens]].any()


def _spans(tokens_C: Sequence[int]) -> Iterator[tuple[int, int]]:
    return pairwise(accumulate(tokens_C, initial=0))
