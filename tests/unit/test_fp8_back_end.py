"""The products in fp8 by Transformer Engine, on replacements (`tests/te_fp8.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.fp8 import te
from megatron_laer.layer.experts.fp8.padding import padded, unpadded
from megatron_laer.layer.experts.fp8.payload import PayloadForm, PayloadPacker
from megatron_laer.layer.experts.slot_linear import slot_linear
from megatron_laer.precision import Precision
from tests import te_fp8
from tests.doubles.fp8_experts import Fp8Linear, Recipe
from tests.slot_gemm import SPLITS, fixed_experts, poisoned_memory
from tests.te_fp8 import Quantiser, Tensor

ROWS, COLUMNS = 64, 32
GPU = torch.device("cuda", 0)


@pytest.fixture(params=["hybrid", "e4m3"])
def fp8_format(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=["tensorwise", "blockwise", "mxfp8"])
def config(
    request: pytest.FixtureRequest, fp8_format: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Replace Transformer Engine; return a TransformerConfig's fields."""
    monkeypatch.setattr(te.grouped.GEMM.__class__, "problem", lambda *_: None)
    with te_fp8.replaced():
        yield SimpleNamespace(fp8=fp8_format, fp8_recipe=request.param, params_dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens_C", SPLITS.values(), ids=SPLITS)
def test_transformer_engines_calls_give_the_definitions_bits(
    config: Any, tokens_C: Sequence[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "generator": generator}
    weights = [torch.randn(ROWS, COLUMNS, **options) for _ in tokens_C]
    # A power of two as scale changes no value, but for those near zero: so rows differ in size.
    size_T1 = 10.0 ** torch.randint(-4, 4, (sum(tokens_C), 1), generator=generator).bfloat16()
    input_TK = torch.randn(sum(tokens_C), COLUMNS, **options) * size_T1
    grad_TR = torch.randn(sum(tokens_C), ROWS, **options) * size_T1
    placeholder = torch.zeros(len(tokens_C), ROWS, COLUMNS, dtype=torch.bfloat16)
    gemm, recipe = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU), Recipe.of(config)
    payloads = []
    for packer in gemm.packers:
        assert isinstance(packer, PayloadPacker)
        payloads.append(torch.stack([packer.pack(weight) for weight in weights]))
        assert payloads[-1].shape[1:] == packer.carried[:2]
        assert payloads[-1].dtype == packer.carried.dtype == torch.uint8
        form = packer.form
        for payload_PK, weight in zip(payloads[-1], weights, strict=True):
            defined = recipe.weight_in_fp8(weight, in_backward=form.by_columns)
            assert torch.equal(payload_PK, form.pack(*defined))
    experts = fixed_experts(payloads[0], placeholder, payloads[1])
    given, slots_CRK = input_TK.clone().requires_grad_(), placeholder.clone().requires_grad_()
    with poisoned_memory():
        output = slot_linear(given, slots_CRK, experts, 0, list(tokens_C), gemm)
        input_grad, slots_grad_CRK = torch.autograd.grad(output, (given, slots_CRK), grad_TR)
    # As at home, with the rows of zeros that a replica's product has.
    at_home, of_homes = input_TK.clone().requires_grad_(), [w.requires_grad_() for w in weights]
    outputs = []
    for part_nK, weight in zip(at_home.split(list(tokens_C)), of_homes, strict=True):
        padding = 0, 0, 0, -len(part_nK) % recipe.multiple
        padded_nK = torch.nn.functional.pad(part_nK, padding)
        outputs.append(Fp8Linear.apply(padded_nK, weight, recipe)[: len(part_nK)])
    expected = torch.cat(outputs)
    grads = torch.autograd.grad(expected, (at_home, *of_homes), grad_TR)
    for mine, defined in zip(
        (output, input_grad, *slots_grad_CRK), (expected, *grads), strict=True
    ):
        assert torch.equal(mine, defined)
    # The definitions themselves, slot by slot: near the product without fp8, and not equal to it.
    is_mx = config.fp8_recipe == "mxfp8"
    assert torch.equal(*payloads) != is_mx
    for tokens, got, turned, most in (
        (input_TK, output, [weight.t() for weight in of_homes], 6e-2),
        (grad_TR, input_grad, weights, 1e-1),  # two bits of values in e5m2
    ):
        parts = zip(tokens.split(list(tokens_C)), turned, strict=True)
        exact = torch.cat([part @ weight for part, weight in parts])
        error = (got - exact).float().norm() / exact.float().norm()
        assert not len(tokens) or 1e-3 < error < most


def test_each_product_quantises_tokens_in_its_own_direction(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    quantise = Quantiser.__call__

    def recorded(self: Any, matrix: torch.Tensor) -> Any:
        asked.append((self.rowwise, self.columnwise))
        return quantise(self, matrix)

    monkeypatch.setattr(Quantiser, "__call__", recorded)
    gemm = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    tokens_C, options = [3, 0, 64], {"dtype": torch.bfloat16}
    input_TK, grad_TR = torch.ones(67, COLUMNS, **options), torch.ones(67, ROWS, **options)
    weights = [torch.ones(ROWS, COLUMNS, **options)] * 3
    payload, in_backward = (
        torch.stack([packer.pack(weight) for weight in weights]) for packer in gemm.packers
    )
    asked.clear()
    gemm.forward(input_TK, payload, tokens_C)
    gemm.input_grad(grad_TR, in_backward, tokens_C)
    gemm.weight_grad(
        grad_TR, gemm.kept(input_TK, tokens_C), tokens_C, torch.empty(3, ROWS, COLUMNS, **options)
    )
    along_columns = (config.fp8_recipe == "tensorwise", True)  # transposes what is along rows
    assert asked == [(True, False)] * 4 + [along_columns] * 4


@pytest.mark.parametrize("config", ["tensorwise", "blockwise"], indirect=True)
def test_a_parameter_in_fp8_sends_its_own_bytes_and_scales(config: Any) -> None:
    gemm: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    payload_PK = gemm.packers[0].pack(torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16))
    gemm._forms[0].unpack(payload_PK)[1].mul_(3.0)  # unlike those of a new quantisation
    (parameter,) = gemm._weights(payload_PK[None])
    assert torch.equal(gemm.packers[0].pack(parameter), payload_PK)


@pytest.mark.parametrize("config", ["mxfp8"], indirect=True)
def test_a_parameter_in_mxfp8_sends_its_own_bytes_of_each_direction(config: Any) -> None:
    gemm = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    quantise = Quantiser("e4m3", rowwise=True, columnwise=True)
    parameter: Any = quantise(torch.randn(ROWS, COLUMNS).bfloat16())
    for packer, direction in zip(gemm.packers, ("row", "column"), strict=True):
        values, scales = (
            getattr(parameter, f"_{direction}wise_{part}") for part in ("data", "scale_inv")
        )
        values ^= 1  # unlike those of a new quantisation
        scales += 1
        form = PayloadForm(Precision.MXFP8, ROWS, COLUMNS, direction == "column")
        kept, kept_scales = form.unpack(packer.pack(parameter))
        assert torch.equal(kept, values)
        assert torch.equal(kept_scales, scales[tuple(map(slice, kept_scales.shape))])


@pytest.mark.parametrize(
    ("name", "value", "variable"),
    [
        ("backward_override", "high_precision", "NVTE_BACKWARD_OVERRIDE"),
        ("enable_2d_quantization", True, "NVTE_MXFP8_ENABLE_2D_QUANTIZATION"),
    ],
)
def test_settings_that_replicas_do_not_follow_are_refused(
    config: Any, name: str, value: object, variable: str
) -> None:
    recipe = SimpleNamespace(**{name: value})
    with (
        mock.patch("megatron.core.fp8_utils.get_fp8_recipe", lambda _: recipe),
        pytest.raises(ValueError, match=rf"{variable}.* has {name}={value}, .*; unset it"),
    ):
        fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)


def test_unfit_sizes_packages_and_signatures_are_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiple = 32 if config.fp8_recipe == "mxfp8" else 16
    with pytest.raises(ValueError, match=f"40 x 32 elements, and .* needs multiples of {multiple}"):
        fp8.quantised_gemm(config, 40, 32, GPU)
    missing = r"Float8.*Quantizer of Tr.* has no amax_epsilon, .*; install transformer-engine 2.11"
    if config.fp8_recipe != "mxfp8":
        monkeypatch.delattr(Quantiser, "__init__")
    else:
        monkeypatch.delattr(Tensor, "__new__")
        missing = r"MXFP8Tensor of Tr.*, with_gemm_swizzled_scales; install transformer-engine 2.12"
    with pytest.raises(ValueError, match=missing):
        fp8.quantised_gemm(config, 32, 32, GPU)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"fp8-experts: Transformer Engine .*; leave out --fp8"):
        fp8.quantised_gemm(config, 32, 32, torch.device("cpu"))


@pytest.mark.parametrize("tokens_C", [[0, 3, 16, 1], [16, 32], [0, 0], []])
def test_padding_adds_rows_of_zeros_and_takes_them_off(tokens_C: list[int]) -> None:
    tokens_TK = torch.randn(sum(tokens_C), 4)
    padded_UK = padded(tokens_TK, tokens_C, 16)
    parts = padded_UK.split([-(-tokens // 16) * 16 for tokens in tokens_C])
    for part, own in zip(parts, tokens_TK.split(tokens_C), strict=True):
        assert len(part) % 16 == 0 and torch.equal(part[: len(own)], own)
        assert not part[len(own) :].any()
    assert torch.equal(unpadded(padded_UK, tokens_C, 16), tokens_TK)
