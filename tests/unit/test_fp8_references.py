"""Definitions of fp8 quantisers equal Transformer Engine's own references, byte for byte.

The references are Python of Transformer Engine's repository, of which TRANSFORMER_ENGINE_CHECKOUT
names a checkout. They need torch alone, so classes of the package are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from runpy import run_path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.checkouts import checkout
from tests.doubles import fp8
from tests.unit.test_fp8_definitions import matrix

CHECKOUT, pytestmark = checkout("TRANSFORMER_ENGINE_CHECKOUT", "Transformer Engine")
SIZES = [(1, 16), (16, 48), (160, 144), (128, 512), (300, 272)]
CURRENT_SCALING = "transformer_engine/pytorch/custom_recipes/reference_current_scaling.py"
BY_BLOCKS = "tests/pytorch/references/blockwise_quantizer_reference.py"


class Quantiser:
    """Replacement of the base class of Transformer Engine's quantisers."""

    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that runs a file of the checkout and returns its names."""
    package: Any = ModuleType("transformer_engine.pytorch.custom_recipes")
    package.gemm = package.reference_utils = mock.MagicMock()
    names = ("transformer_engine", "transformer_engine.pytorch")
    base = SimpleNamespace(QuantizedTensorStorage=object, Quantizer=Quantiser)
    modules = {name: ModuleType(name) for name in names} | {package.__name__: package}
    modules["transformer_engine.pytorch.quantized_tensor"] = base  # type: ignore[assignment]
    monkeypatch.syspath_prepend(str(CHECKOUT / "tests" / "pytorch"))
    with mock.patch.dict(sys.modules, modules):
        yield lambda file: run_path(str(CHECKOUT / file))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_quantisers_equal_their_references(
    reference: Any, size: tuple[int, int], source: torch.dtype, dtype: torch.dtype
) -> None:
    current = reference(CURRENT_SCALING)["CurrentScalingQuantizerRef"](dtype)
    by_blocks = reference(BY_BLOCKS)["BlockwiseQuantizerReference"]()
    for seed in range(10):
        whole = matrix(*size, source, seed)
        whole[0] *= seed > 0  # rows of zeros too
        values, scale, *_ = current._quantize(whole)
        same(fp8.per_tensor(whole, dtype), values, scale)
        for block in ((128, 128), (1, 128)):
            expected = by_blocks.quantize(
                whole,
                dtype,
                return_transpose=True,
                pow_2_scales=True,
                quant_tile_shape=block,
                munge_scale_shapes=False,
            )
            same(fp8.by_blocks(whole, dtype, block), expected.data, expected.scale)
            of_columns = fp8.by_blocks(whole, dtype, block[::-1])
            transposed = fp8.Quantised(of_columns.values_RK.t(), of_columns.scales.t())
            same(transposed, expected.data_t, expected.scale_t)


def same(found: fp8.Quantised, values_RK: torch.Tensor, scales: torch.Tensor) -> None:
    assert torch.equal(
        found.values_RK.contiguous().view(torch.uint8), values_RK.contiguous().view(torch.uint8)
    )
    assert torch.equal(found.scales, scales)
