"""Experts of published models in fp8 on the meta device: shapes and dtypes at full size, no values.

The products run by the code for Transformer Engine, on replacements of its parts. With a checkout,
`test_fp8_te_python.py` has its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.slot_linear import slot_linear
from megatron_laer.precision import Precision
from tests.slot_gemm import fixed_experts
from tests.unit.test_fp8_back_end import GPU, config, fp8_format

__all__ = ["config", "fp8_format"]  # fixtures

# (R, K) of both linear layers of an expert.
MODELS = {
    "DeepSeek-V3": [(4096, 7168), (7168, 2048)],
    "Qwen3-235B": [(3072, 4096), (4096, 1536)],
    "gpt-oss-120b": [(5760, 2880), (2880, 2880)],
}
# Tokens of replica slots: many, none, one, and no multiple of a block.
TOKENS_C = [65536, 0, 1, 4001]


@pytest.mark.parametrize("fp8_format", ["e4m3"], indirect=True)
@pytest.mark.parametrize("model", MODELS)
def test_payloads_and_products_have_their_shapes_at_full_size(config: Any, model: str) -> None:
    slots, tokens = len(TOKENS_C), sum(TOKENS_C)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    for rows, columns in MODELS[model]:
        gemm = fp8.quantised_gemm(config, rows, columns, GPU)
        payloads = []
        for packer in (gemm, gemm.for_backward):
            packed = [packer.pack(torch.empty(rows, columns, **options)) for _ in range(slots)]
            payloads.append(torch.stack(packed))
            assert payloads[-1].dtype == packer.carried.dtype == torch.uint8
            assert payloads[-1].shape[1:] == packer.carried[:2]
            # As the planner and the simulator price them.
            assert payloads[-1].shape[1] == Precision(config.fp8_recipe).row.payload_rows(
                rows, columns
            )
        weight_CRK = torch.empty(slots, rows, columns, **options).requires_grad_()
        input_TK = torch.empty(tokens, columns, **options).requires_grad_()
        experts = fixed_experts(payloads[0], weight_CRK.detach(), payloads[1])
        output_TR = slot_linear(input_TK, weight_CRK, experts, 0, TOKENS_C, gemm)
        assert (output_TR.shape, output_TR.dtype) == ((tokens, rows), torch.bfloat16)
        output_TR.backward(torch.empty_like(output_TR))
        for of in (input_TK, weight_CRK):
            assert of.grad is not None and of.grad.is_meta
            assert (of.grad.shape, of.grad.dtype) == (of.shape, of.dtype)
