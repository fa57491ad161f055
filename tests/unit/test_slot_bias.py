"""Each slot's bias is added to its tokens, and its gradient is the sum over them."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.layer.experts.slot_linear import slot_bias
from tests.slot_gemm import SPLITS, fixed_experts

ROWS = 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scaled", [False, True], ids=["as it is", "by probability"])
@pytest.mark.parametrize("split", SPLITS)
def test_output_and_gradients_are_those_of_a_bias_for_each_token(
    split: str, scaled: bool, dtype: torch.dtype
) -> None:
    tokens_C = SPLITS[split]
    generator = torch.Generator().manual_seed(0)
    bias_CR1 = torch.randn(len(tokens_C), ROWS, 1, generator=generator).to(dtype).requires_grad_()
    input_TR = torch.randn(sum(tokens_C), ROWS, generator=generator).to(dtype).requires_grad_()
    grad_TR = torch.randn(sum(tokens_C), ROWS, generator=generator).to(dtype)
    # Probabilities are wider than the experts' dtype.
    scale_T = torch.rand(sum(tokens_C), generator=generator).requires_grad_() if scaled else None
    inputs = [tensor for tensor in (input_TR, bias_CR1, scale_T) if tensor is not None]

    experts = fixed_experts(bias_CR1.detach())
    output_TR = slot_bias(input_TR.clone(), scale_T, bias_CR1, experts, 0, tokens_C)
    found = torch.autograd.grad(output_TR, inputs, grad_TR)

    bias_TR = bias_CR1.squeeze(2).double().repeat_interleave(torch.tensor(tokens_C), 0)
    added_TR = bias_TR if scale_T is None else bias_TR * scale_T.double().unsqueeze(1)
    expected_TR = input_TR.double() + added_TR
    expected = torch.autograd.grad(expected_TR, inputs, grad_TR.double())
    assert output_TR.dtype == dtype
    torch.testing.assert_close(output_TR, expected_TR.to(dtype))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
