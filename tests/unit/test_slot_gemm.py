"""Every GEMM back end computes a linear layer per slot, and back ends are chosen by name.

Transformer Engine's function is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.layer.experts.gemm import (
    SlotGemm,
    check_gemm,
    gemm_names,
    slot_gemm,
    te,
)
from tests.slot_gemm import SPLITS, TOKENS_C, check_back_end, check_weight_grad

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BOTH = [torch.float32, torch.bfloat16]


def grouped_gemm(
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    out: list[torch.Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    gelu: bool = False,
    grad: bool = False,
    accumulate: bool = False,
    bias: None = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    D_dtype: None = None,
    single_output: bool = False,
) -> None:
    """Compute as Transformer Engine does for bf16: column-major, so B comes first."""
    assert len(A) == len(B) == len(quantization_params) and out_dtype == out[0].dtype
    assert all(part.is_contiguous() for part in (*A, *B, *out))
    outs = out[0].split(m_splits or []) if single_output else out
    for first, second, product in zip(A, B, outs, strict=True):
        left = second.t() if layout[1] == "T" else second
        right = first.t() if layout[0] == "T" else first
        assert left.shape[1] == right.shape[0]
        if not first.numel() or not second.numel():
            if product.numel() and not accumulate:
                product.zero_()
            continue
        result = (left.float() @ right.float()).to(product.dtype)
        product.copy_(product + result if accumulate else result)


@pytest.fixture(params=gemm_names())
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SlotGemm:
    monkeypatch.setattr(te, "grouped_gemm", lambda: grouped_gemm)
    return slot_gemm(request.param)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("tokens_C", SPLITS.values(), ids=SPLITS)
def test_a_back_end_equals_a_linear_layer_per_slot(
    gemm: SlotGemm, dtype: torch.dtype, tokens_C: Sequence[int]
) -> None:
    check_back_end(gemm, dtype, CPU, tokens_C)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("tokens_C", SPLITS.values(), ids=SPLITS)
def test_weight_gradients_are_written_or_added_and_float32_ones_are_not_rounded(
    gemm: SlotGemm, dtype: torch.dtype, out_dtype: torch.dtype, tokens_C: Sequence[int]
) -> None:
    check_weight_grad(gemm, dtype, out_dtype, CPU, tokens_C)


def test_offsets_are_uploaded_once_for_the_products_of_a_microbatch() -> None:
    from megatron_laer.layer.experts.gemm import torch as grouped

    grouped._ends.cache_clear()
    check_back_end(slot_gemm("torch"), torch.float32, CPU, TOKENS_C)
    assert (grouped._ends.cache_info().misses, grouped._ends.cache_info().hits) == (1, 1)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "sizes", "says"),
    [
        ("torch", CPU, torch.bfloat16, (64, 36), "multiples of 8 in torch.bfloat16, and 36 is not"),
        ("torch", CPU, torch.float32, (64, 34), "multiples of 4 in torch.float32, and 34 is not"),
        ("torch", GPU, torch.float32, (), "in bf16, not in torch.float32; give --bf16, or"),
        ("torch", GPU, torch.bfloat16, (), r"capability 8\.0, for which .* --fsep-set gemm=loop"),
    ],
)
def test_what_a_back_end_cannot_do_is_refused_with_the_way_out(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=f"^--fsep-set gemm={name}: .*{says}"):
        check_gemm(name, device, dtype, sizes)


def test_what_works_is_not_refused_and_a_torch_without_the_function_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_gemm("loop", CPU, torch.float32, (3, 5))
    check_gemm("torch", CPU, torch.float32, (64, 36))
    check_gemm("torch", GPU, torch.bfloat16, (64, 40))
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(ValueError, match=r"has no torch\.nn\.functional\.grouped_mm; install"):
        check_gemm("torch", CPU, torch.float32)


def test_transformer_engine_is_guarded_by_package_device_symbol_and_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return te.GEMM.problem(device, dtype)

    there: list[object] = [None]
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda _: there[0])
    assert "not installed (there is no package transformer_engine)" in (refusal() or "")
    there[0] = object()
    assert "needs a GPU, and this rank computes on cpu" in (refusal(CPU) or "")
    assert "rounds float32 to TF32" in (refusal(dtype=torch.float32) or "")

    package = SimpleNamespace(__version__="2.9")
    modules: dict[str, Any] = {te._PACKAGE: package, te._MODULE: SimpleNamespace()}
    monkeypatch.setattr(te.importlib, "import_module", modules.__getitem__)
    te.grouped_gemm.cache_clear()
    assert "general_grouped_gemm cannot be imported" in (refusal() or "")
    modules[te._MODULE].general_grouped_gemm = lambda A, B, out, out_dtype, workspaces: None
    said = refusal() or ""
    assert "Transformer Engine 2.9 takes (A, B, out, out_dtype, workspaces)" in said
    assert "install transformer-engine 2.11 to 2.20, or give --fsep-set gemm=loop" in said
    te.grouped_gemm.cache_clear()
    modules[te._MODULE].general_grouped_gemm = grouped_gemm
    assert refusal() is None
    te.grouped_gemm.cache_clear()
