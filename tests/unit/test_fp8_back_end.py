"""The products in fp8 by Transformer Engine, on replacements of its quantiser, tensor and GEMM.

They do what Transformer Engine documents, by the definitions in `megatron_laer/cpu/fp8.py`, and
refuse what its kernels do.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.cpu import fp8 as definitions
from megatron_laer.cpu.fp8_experts import EmulatedGemm
from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.fp8 import te
from megatron_laer.layer.experts.fp8.padding import padded, unpadded
from megatron_laer.layer.experts.slot_linear import slot_linear
from tests.slot_gemm import SPLITS, poisoned_memory

ROWS, COLUMNS = 64, 32
KINDS = {"e4m3": definitions.E4M3, "e5m2": definitions.E5M2}
GPU = torch.device("cuda", 0)


class Tensor:
    """Replacement of `Float8Tensor`: bytes, their scale, and the transpose for column-wise use."""

    def __init__(
        self,
        *,
        shape: Any,
        dtype: Any,
        data: torch.Tensor,
        fp8_scale_inv: torch.Tensor,
        fp8_dtype: str,
    ) -> None:
        assert tuple(data.shape) == tuple(shape) and data.dtype == torch.uint8
        assert data.is_contiguous() and fp8_scale_inv.shape == (1,)
        self._data, self._scale_inv, self.kind = data, fp8_scale_inv, fp8_dtype
        self.device, self.has_columns = data.device, False

    def update_usage(self, columnwise_usage: bool) -> None:
        self.has_columns = columnwise_usage

    @property
    def values(self) -> torch.Tensor:
        quantised = definitions.Quantised(self._data.view(KINDS[self.kind]), self._scale_inv)
        return definitions.dequantised(quantised)


class Storage:
    def __new__(
        cls,
        *args: Any,
        data: Any,
        fp8_scale_inv: Any,
        fp8_dtype: Any,
        data_transpose: Any = None,
        quantizer: Any = None,
    ) -> Storage:
        raise NotImplementedError


class Quantiser:
    def __init__(
        self,
        fp8_dtype: str,
        device: torch.device,
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool,
        amax_epsilon: float,
    ) -> None:
        assert rowwise and columnwise and not force_pow_2_scales and amax_epsilon == 0.0
        self.kind = fp8_dtype

    def __call__(self, matrix: torch.Tensor) -> Tensor:
        assert matrix.is_contiguous() and matrix.shape[1] % 16 == 0
        values, scale = definitions.per_tensor(matrix, KINDS[self.kind])
        made = Tensor(
            shape=matrix.shape,
            dtype=matrix.dtype,
            data=values.view(torch.uint8),
            fp8_scale_inv=scale,
            fp8_dtype=self.kind,
        )
        made.has_columns = True
        return made


def grouped_gemm(
    A: list[Tensor],
    B: list[Tensor],
    out: list[torch.Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    *,
    layout: str,
    m_splits: list[int],
    grad: bool,
    use_split_accumulator: bool,
    single_output: bool = False,
) -> None:
    """Multiply column-major operands, in float32, and refuse sizes that cuBLAS does."""
    assert len(A) == len(B) == len(m_splits) == len(quantization_params)
    assert grad == (layout != "TN") and use_split_accumulator == grad
    outs = out[0].split(m_splits) if single_output else out
    for first, second, tokens, product in zip(A, B, m_splits, outs, strict=True):
        assert tokens % 16 == 0 and tokens > 0 and all(size % 16 == 0 for size in product.shape)
        assert first.has_columns or layout[0] == "T"
        assert second.has_columns or layout[1] == "N"
        left = second.values.t() if layout[1] == "T" else second.values
        right = first.values.t() if layout[0] == "T" else first.values
        product.copy_((left @ right).to(out_dtype))


@pytest.fixture(params=["hybrid", "e4m3"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace Transformer Engine; return a TransformerConfig's fields."""
    from megatron.core import fp8_utils

    exact = SimpleNamespace(power_2_scale=False, amax_epsilon=0.0)
    recipe = SimpleNamespace(
        fp8_quant_fwd_inp=exact,
        fp8_quant_fwd_weight=exact,
        fp8_quant_bwd_grad=exact,
        fp8_gemm_fprop=SimpleNamespace(use_split_accumulator=False),
        fp8_gemm_dgrad=SimpleNamespace(use_split_accumulator=True),
        fp8_gemm_wgrad=SimpleNamespace(use_split_accumulator=True),
    )
    modules = {
        te._TENSORS: SimpleNamespace(Float8CurrentScalingQuantizer=Quantiser, Float8Tensor=Tensor),
        te._module("Float8TensorStorage"): SimpleNamespace(Float8TensorStorage=Storage),
        "transformer_engine_torch": SimpleNamespace(
            DType=SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2")
        ),
    }
    found = importlib.import_module
    monkeypatch.setattr(
        te.importlib, "import_module", lambda name, *a: modules.get(name) or found(name, *a)
    )
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda _: recipe)
    monkeypatch.setattr(te.grouped, "grouped_gemm", lambda: grouped_gemm)
    monkeypatch.setattr(te.grouped.GEMM.__class__, "problem", lambda *_: None)
    return SimpleNamespace(fp8=request.param, params_dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens_C", SPLITS.values(), ids=SPLITS)
def test_transformer_engines_calls_give_the_definitions_bits(
    config: Any, tokens_C: Sequence[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "generator": generator}
    weights = [torch.randn(ROWS, COLUMNS, **options) for _ in tokens_C]
    input_TK = torch.randn(sum(tokens_C), COLUMNS, **options)
    grad_TR = torch.randn(sum(tokens_C), ROWS, **options)
    placeholder = torch.zeros(len(tokens_C), ROWS, COLUMNS, dtype=torch.bfloat16)
    found = []
    for gemm in (
        fp8.quantised_gemm(config, ROWS, COLUMNS, GPU),
        EmulatedGemm(config, ROWS, COLUMNS),
    ):
        payload = torch.stack([gemm.pack(weight) for weight in weights])
        assert payload.shape[1:] == gemm.carried[:2] and payload.dtype == gemm.carried.dtype
        experts = SimpleNamespace(
            weights=SimpleNamespace(matrix=lambda _, payload=payload: payload),
            grads=SimpleNamespace(new=lambda _: torch.full_like(placeholder, float("nan"))),
        )
        given, weight = input_TK.clone().requires_grad_(), placeholder.clone().requires_grad_()
        with poisoned_memory():
            output = slot_linear(given, weight, experts, 0, list(tokens_C), gemm)  # type: ignore[arg-type]
            grads = torch.autograd.grad(output, (given, weight), grad_TR)
        found.append((payload, output, *grads))
    for mine, defined in zip(*found, strict=True):
        assert torch.equal(mine, defined)
    # The definitions themselves, slot by slot: near the product without fp8, and not equal to it.
    _, output, input_grad, _ = found[1]
    exact = torch.cat(
        [part @ w.t() for part, w in zip(input_TK.split(list(tokens_C)), weights, strict=True)]
    )
    if sum(tokens_C):
        error = (output - exact).float().norm() / exact.float().norm()
        assert 1e-3 < error < 6e-2 and bool(input_grad.any())


def test_unfit_sizes_packages_and_signatures_are_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="40 x 32 elements, and fp8 needs multiples of 16"):
        fp8.quantised_gemm(config, 40, 32, GPU)
    monkeypatch.delattr(Quantiser, "__init__")
    with pytest.raises(ValueError, match=r"Float8CurrentScalingQuantizer .* has no amax_epsilon"):
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
