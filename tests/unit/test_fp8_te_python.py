"""A replica computes as Transformer Engine's own GroupedLinear, whose kernels are replaced.

Its Python comes from the checkout that TRANSFORMER_ENGINE_CHECKOUT names (`tests/te_python.py`): so
constructors, parameters and the directions of operands are the real ones. On the meta device sizes
are those of published models, and nothing has a value.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import fp8_utils

from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.fp8 import te
from megatron_laer.layer.experts.slot_linear import slot_linear
from megatron_laer.precision import Precision
from tests import te_python
from tests.checkouts import checkout
from tests.slot_gemm import fixed_experts

CHECKOUT, pytestmark = checkout("TRANSFORMER_ENGINE_CHECKOUT", "Transformer Engine")
RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
# R, K and the tokens of slots: odd blocks on the CPU, DeepSeek-V3's first matrix without values.
SIZES = {
    "cpu": (160, 288, [64, 0, 32, 128]),
    "meta": (4096, 7168, [4096, 0, 64, 8192]),
}


@pytest.fixture(scope="module", autouse=True)
def transformer_engine() -> Iterator[None]:
    with te_python.te_python(CHECKOUT):
        yield


def recipe_of(name: str, fp8_format: str) -> Any:
    recipes = importlib.import_module("transformer_engine.common.recipe")
    return getattr(recipes, RECIPES[name])(fp8_format=recipes.Format[fp8_format.upper()])


# On the meta device Transformer Engine puts off quantising parameters.
@pytest.mark.parametrize(
    ("device", "kept_in_fp8"), [("cpu", False), ("cpu", True), ("meta", False)]
)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_replica_computes_as_the_module_of_its_home(
    recipe: str, fp8_format: str, device: str, kept_in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns, tokens_C = SIZES[device]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    card = (10, 0) if recipe == "mxfp8" else (9, 0)
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: card)
    module, inputs, grads = home(recipe, fp8_format, kept_in_fp8, device)
    calls: list[Any] = []
    gemm = te_python.grouped_gemm
    native = importlib.import_module("transformer_engine_torch")

    def recorded(*args: Any) -> Any:
        calls.append((args[1], args[3], args[15]))  # the layout, and whether sums are split
        return gemm(*args)

    monkeypatch.setattr(native, "te_general_grouped_gemm", recorded)
    at_home = inputs.clone().requires_grad_()
    with quantization.fp8_autocast(enabled=True, fp8_recipe=recipe_of(recipe, fp8_format)):
        expected = module(at_home, tokens_C)
    expected.backward(grads)
    calls_at_home = calls.copy()
    calls.clear()

    config = SimpleNamespace(fp8=fp8_format, fp8_recipe=recipe, params_dtype=torch.bfloat16)
    monkeypatch.setattr(
        fp8_utils, "get_fp8_recipe", lambda config: recipe_of(config.fp8_recipe, config.fp8)
    )
    monkeypatch.setattr(te.grouped.GEMM.__class__, "problem", lambda *_: None)
    replica = fp8.quantised_gemm(config, rows, columns, torch.device(device))
    weights = [getattr(module, f"weight{slot}") for slot in range(len(tokens_C))]
    payloads = [
        torch.stack([packer.pack(weight.detach()) for weight in weights])
        for packer in replica.packers
    ]
    packed = Precision(recipe).row
    for payload_CPK in payloads:
        assert payload_CPK.shape[1:] == (packed.payload_rows(rows, columns), columns)
        assert payload_CPK.dtype == torch.uint8 and payload_CPK.device.type == device
    placeholder = torch.zeros(
        len(tokens_C), rows, columns, dtype=torch.bfloat16, device=device
    ).requires_grad_()
    experts = fixed_experts(payloads[0], placeholder.detach(), payloads[1])
    given = inputs.clone().requires_grad_()
    output = slot_linear(given, placeholder, experts, 0, tokens_C, replica)
    output.backward(grads)

    assert calls == calls_at_home
    same(output, expected)
    same(given.grad, at_home.grad)
    assert placeholder.grad is not None
    for mine, weight, tokens in zip(placeholder.grad, weights, tokens_C, strict=True):
        same(mine, weight.grad, is_zero=not tokens)


def same(
    mine: torch.Tensor | None, expected: torch.Tensor | None, *, is_zero: bool = False
) -> None:
    assert mine is not None and expected is not None
    assert (mine.shape, mine.dtype, mine.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    assert mine.is_meta or (torch.equal(mine, expected) and bool(mine.any()) != is_zero)


def home(recipe: str, fp8_format: str, kept_in_fp8: bool, device: str) -> tuple[Any, ...]:
    """Return Transformer Engine's module, tokens and their gradients."""
    rows, columns, tokens_C = SIZES[device]
    grouped = importlib.import_module("transformer_engine.pytorch.module.grouped_linear")
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    torch.manual_seed(0)
    with quantization.fp8_model_init(enabled=kept_in_fp8, recipe=recipe_of(recipe, fp8_format)):
        module = grouped.GroupedLinear(
            len(tokens_C), columns, rows, bias=False, params_dtype=torch.bfloat16, device=device
        )
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return (
        module,
        torch.randn(sum(tokens_C), columns, **options),
        torch.randn(sum(tokens_C), rows, **options),
    )


def test_the_grouped_gemm_takes_what_we_call_it_with() -> None:
    with mock.patch.object(te.grouped.importlib.util, "find_spec", lambda _: "found"):
        device = torch.device("cuda", 0)
        for recipe in (Precision.TENSORWISE, Precision.BLOCKWISE):
            assert te.problem(device, recipe.row) is None
