"""Definitions of fp8 quantisers on the CPU: Transformer Engine's recipes, in torch's float8 types.

Casts saturate, as those of the kernels do. Values are scaled in float32. A scale is kept as the
factor that gives a value back.

Legend: R rows of a matrix, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

MX_BLOCK = 32
_MANTISSA_BITS = 23
_LARGEST_EXPONENT, _NAN_EXPONENT = 254, 255


# Rows and columns of a matrix that share a scale; None for one scale of all.
Block = tuple[int, int] | None
MX_ROWS, MX_COLUMNS = (1, MX_BLOCK), (MX_BLOCK, 1)


class Quantised(NamedTuple):
    """Matrix in fp8, and its scales: one, one per block, or 8-bit exponents."""

    values_RK: torch.Tensor
    scales: torch.Tensor


def quantised(matrix_RK: torch.Tensor, dtype: torch.dtype, block: Block) -> Quantised:
    """Quantise by the definition whose scales are of such blocks."""
    if block is None:
        return per_tensor(matrix_RK, dtype)
    if block in (MX_ROWS, MX_COLUMNS):
        return mx(matrix_RK, dtype, by_columns=block == MX_COLUMNS)
    return by_blocks(matrix_RK, dtype, block)


def per_tensor(matrix_RK: torch.Tensor, dtype: torch.dtype) -> Quantised:
    """Quantise with one scale, by the largest absolute value now (current scaling)."""
    amax = matrix_RK.abs().amax() if matrix_RK.numel() else matrix_RK.new_zeros(())
    scale = _scale(amax.float().view(1), dtype, matrix_RK.dtype)
    return Quantised(_cast(matrix_RK.float() * scale, dtype), scale.reciprocal())


def by_blocks(matrix_RK: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantised:
    """Quantise with a power of two for each block: 128 x 128 of weights, 1 x 128 of tokens."""
    _, exponent = torch.frexp(_scale(_block_amax(matrix_RK, block), dtype, matrix_RK.dtype))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1)
    scaled = matrix_RK.float() * _spread(scale, block, matrix_RK.shape)
    return Quantised(_cast(scaled, dtype), scale.reciprocal())


def mx(matrix_RK: torch.Tensor, dtype: torch.dtype, *, by_columns: bool = False) -> Quantised:
    """Quantise with an 8-bit exponent for each 32 values of a row, or of a column (mxfp8)."""
    block = MX_COLUMNS if by_columns else MX_ROWS
    amax = _block_amax(matrix_RK, block)
    exponents = _rounded_up_exponents(amax * amax.new_tensor(1.0 / torch.finfo(dtype).max))
    factor = _spread(_power_of_two(254 - exponents.to(torch.int32)), block, matrix_RK.shape)
    factor = factor.masked_fill(_spread(exponents, block, matrix_RK.shape) == 255, torch.nan)
    return Quantised(_cast(matrix_RK.float() * factor, dtype), exponents)


def dequantised(matrix: Quantised, block: Block = None) -> torch.Tensor:
    """Return float32 values; `block` is that of `quantised`."""
    values_RK, scales = matrix
    if scales.dtype == torch.uint8:
        scales = _power_of_two(scales.to(torch.int32))
    if block is not None:
        scales = _spread(scales, block, values_RK.shape)
    return values_RK.float() * scales


def _scale(amax: torch.Tensor, dtype: torch.dtype, of: torch.dtype) -> torch.Tensor:
    """Return the largest fp8 value over `amax`; 1 where that is zero, infinite or NaN."""
    # A number over a tensor would be rounded twice, as its reciprocal and as a product.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax
    scale = scale.masked_fill(scale == torch.inf, torch.finfo(of).max)
    return scale.masked_fill((amax == 0) | ~amax.isfinite(), 1.0)


def _cast(values_RK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return values_RK.clamp(-largest, largest).to(dtype)


def _block_amax(matrix_RK: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = matrix_RK.shape
    grid = [-(-rows // block[0]), -(-columns // block[1])]
    padding = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
    padded = torch.nn.functional.pad(matrix_RK.abs().float(), padding)
    if not padded.numel():
        return padded.new_zeros(grid)
    amax: torch.Tensor = padded.view(grid[0], block[0], grid[1], block[1]).amax((1, 3))
    return amax


def _spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Return each value's own scale, [R, K]."""
    by_rows = scales.repeat_interleave(block[0], 0)
    return by_rows.repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def _rounded_up_exponents(values: torch.Tensor) -> torch.Tensor:
    """Return the biased exponents of the next powers of two, in 8 bits (E8M0)."""
    bits = values.view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_BITS, bits & (2**_MANTISSA_BITS - 1)
    # A subnormal up to 2^-127 rounds to that, whose biased exponent is 0.
    is_exact = (mantissa == 0) | ((exponent == 0) & (mantissa <= 2 ** (_MANTISSA_BITS - 1)))
    rounded: torch.Tensor = (exponent + (~is_exact).int()).clamp(max=_LARGEST_EXPONENT)
    return rounded.masked_fill(values.isnan(), _NAN_EXPONENT).to(torch.uint8)


def _power_of_two(biased: torch.Tensor) -> torch.Tensor:
    # Not by `ldexp` of the exponent alone: 2^-127 is subnormal.
    return torch.ldexp(torch.ones_like(biased, dtype=torch.float32), biased - 127)
