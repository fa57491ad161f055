"""Definitions of fp8 quantisers: nearest values, scales of their blocks, payloads and back."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.layer.experts.fp8.payload import PayloadForm
from megatron_laer.precision import Precision
from tests.doubles import fp8

SQUARE, ROWS, COLUMNS = (128, 128), (1, 32), (32, 1)
RECIPES = {
    "per tensor": (fp8.per_tensor, None),
    "square": (lambda matrix, dtype: fp8.by_blocks(matrix, dtype, SQUARE), SQUARE),
    "tokens": (lambda matrix, dtype: fp8.by_blocks(matrix, dtype, (1, 128)), (1, 128)),
    "mx rows": (fp8.mx, ROWS),
    "mx columns": (lambda matrix, dtype: fp8.mx(matrix, dtype, by_columns=True), COLUMNS),
}


def representable(dtype: torch.dtype) -> torch.Tensor:
    """Return all finite values of the format, ascending, by their bytes."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()].unique()


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-4, 4, (rows, 1), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_each_value_is_the_nearest_of_its_block(
    name: str, dtype: torch.dtype, source: torch.dtype
) -> None:
    quantise, block = RECIPES[name]
    values = representable(dtype)
    for seed, size in enumerate([(16, 48), (160, 144), (32, 32), (1, 256)]):
        whole = matrix(*size, source, seed)
        got = quantise(whole, dtype)
        back = fp8.dequantised(got, block)
        unit = back / got.values_RK.float()  # each value's own scale
        wanted = whole.float() / unit.nan_to_num(nan=1.0)
        wanted = wanted.clamp(-float(values[-1]), float(values[-1]))
        at = torch.searchsorted(values, wanted.reshape(-1)).clamp(1, len(values) - 1)
        below, above = values[at - 1], values[at]
        nearest = torch.minimum(
            (wanted.reshape(-1) - below).abs(), (above - wanted.reshape(-1)).abs()
        )
        kept = (got.values_RK.float() - wanted).abs().reshape(-1)
        is_zero = got.values_RK.float().reshape(-1) == 0  # its scale is not to be read off
        assert ((kept <= nearest * (1 + 1e-5)) | is_zero).all()
        # No value of a block overflows, and its largest one uses the upper half of the format.
        for block_values, scaled in blocks_of(whole, got.values_RK.float(), block):
            assert (scaled.abs().max() > values[-1] / 4) or block_values.abs().max() == 0


def blocks_of(whole, scaled, block):  # type: ignore[no-untyped-def]
    rows, columns = block or whole.shape
    for row in range(0, whole.shape[0], rows):
        for column in range(0, whole.shape[1], columns):
            cut = slice(row, row + rows), slice(column, column + columns)
            yield whole[cut], scaled[cut]


def test_scales_of_blocks_are_powers_of_two_and_zeros_stay() -> None:
    whole = matrix(160, 144, torch.float32, 1)
    whole[:128, :128] = 0
    square = fp8.by_blocks(whole, fp8.E4M3, SQUARE)
    assert square.scales.shape == (2, 2) and square.scales[0, 0] == 1
    assert (torch.frexp(square.scales)[0] == 0.5).all()
    assert not square.values_RK[:128, :128].float().any()
    by_rows, by_columns = fp8.mx(whole, fp8.E4M3), fp8.mx(whole, fp8.E4M3, by_columns=True)
    assert by_rows.scales.shape == (160, 5) and by_columns.scales.shape == (5, 144)
    assert not fp8.dequantised(by_rows, ROWS)[:128, :128].any()
    none = fp8.per_tensor(torch.zeros(0, 16), fp8.E4M3)
    assert none.values_RK.shape == (0, 16) and none.scales == 1


@pytest.mark.parametrize("size", [(16, 16), (48, 160), (144, 32)])
def test_a_payload_gives_back_values_and_scales_in_its_own_memory(size: tuple[int, int]) -> None:
    whole = matrix(*size, torch.bfloat16, 2)
    cases = {
        PayloadForm(Precision.TENSORWISE, *size): fp8.per_tensor(whole, fp8.E4M3),
        PayloadForm(Precision.BLOCKWISE, *size): fp8.by_blocks(whole, fp8.E4M3, SQUARE),
        PayloadForm(Precision.MXFP8, *size): fp8.mx(whole, fp8.E4M3),
        PayloadForm(Precision.MXFP8, *size, True): fp8.mx(whole, fp8.E4M3, by_columns=True),
    }
    for form, quantised in cases.items():
        packed = form.pack(*quantised)
        values, scales = form.unpack(packed)
        assert torch.equal(values, quantised.values_RK.view(torch.uint8))
        assert torch.equal(scales, quantised.scales)
        rest = packed[size[0] :].reshape(-1)[scales.nbytes :]
        assert not rest.any(), "padding is zero"
        assert values.data_ptr() == packed.data_ptr() and values.is_contiguous()
        start = scales.data_ptr() - packed.data_ptr()
        assert start == size[0] * size[1] and start + scales.nbytes <= packed.numel()
        assert packed.numel() - start - scales.nbytes < size[1], "no row more than the scales fill"
