"""Experts in fp8 on a card: replicas compute as Transformer Engine's own module. Not run yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.layer.experts.gemm import gemm_names, slot_gemm
from megatron_laer.layer.experts.slot_linear import slot_linear
from tests import slot_gemm as cases
from tests.gpu.test_training import RECIPES
from tests.gpu.two_ranks import cannot_compute
from tests.slot_gemm import SPLITS, check_back_end, check_weight_grad, fixed_experts

ROWS, COLUMNS = 256, 128
# Transformer Engine's module takes sizes that cuBLAS accepts, and so none between.
TOKENS_C = [64, 0, 32, 128]


@pytest.fixture(autouse=True)
def needs_fp8(recipe: str) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    if why := cannot_compute(recipe):
        pytest.skip(why)


@pytest.mark.parametrize("kept_in_fp8", [False, True])
@pytest.mark.parametrize(("fp8_format", "recipe"), RECIPES)
def test_a_replica_computes_bit_for_bit_as_transformer_engines_module(
    fp8_format: str, recipe: str, kept_in_fp8: bool
) -> None:
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_laer.layer.experts import fp8

    device = torch.device("cuda", torch.cuda.current_device())
    config = SimpleNamespace(
        fp8=fp8_format,
        fp8_recipe=recipe,
        fp8_dot_product_attention=False,
        params_dtype=torch.bfloat16,
    )
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    with te.fp8_model_init(enabled=kept_in_fp8, recipe=get_fp8_recipe(config)):
        module = te.GroupedLinear(
            len(TOKENS_C), COLUMNS, ROWS, bias=False, params_dtype=torch.bfloat16, device=device
        )
    weights = [getattr(module, f"weight{slot}") for slot in range(len(TOKENS_C))]
    input_TK = torch.randn(sum(TOKENS_C), COLUMNS, **options)
    grad_TR = torch.randn(sum(TOKENS_C), ROWS, **options)

    at_home = input_TK.clone().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(config)):
        expected_TR = module(at_home, TOKENS_C)
    expected_TR.backward(grad_TR)

    gemm = fp8.quantised_gemm(config, ROWS, COLUMNS, device)
    payload_CPK, backward_CPK = (
        torch.stack([packer.pack(weight.detach()) for weight in weights]) for packer in gemm.packers
    )
    placeholder_CRK = torch.zeros(len(TOKENS_C), ROWS, COLUMNS, **options).requires_grad_()
    experts = fixed_experts(payload_CPK, placeholder_CRK.detach(), backward_CPK)
    replica = input_TK.clone().requires_grad_()
    output_TR = slot_linear(replica, placeholder_CRK, experts, 0, TOKENS_C, gemm)
    output_TR.backward(grad_TR)

    assert torch.equal(output_TR, expected_TR)
    assert replica.grad is not None and at_home.grad is not None
    assert torch.equal(replica.grad, at_home.grad)
    assert placeholder_CRK.grad is not None
    for mine, weight in zip(placeholder_CRK.grad, weights, strict=True):
        assert torch.equal(mine, weight.grad)


@pytest.mark.parametrize("name", gemm_names())
@pytest.mark.parametrize("recipe", ["delayed"])
def test_fp8_does_not_reach_the_products_of_experts(name: str) -> None:
    from transformer_engine.pytorch import fp8_autocast

    device, gemm = torch.device("cuda"), slot_gemm(name)
    if (problem := gemm.problem(device, torch.bfloat16, (cases.ROWS, cases.COLUMNS))) is not None:
        pytest.skip(f"{name}: {problem}")
    for tokens_C in SPLITS.values():
        with fp8_autocast(enabled=True):
            check_back_end(gemm, torch.bfloat16, device, tokens_C)
            for out_dtype in (torch.bfloat16, torch.float32):
                check_weight_grad(gemm, torch.bfloat16, out_dtype, device, tokens_C)
