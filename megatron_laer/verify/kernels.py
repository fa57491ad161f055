"""Triton kernels of the sums; `sums` has the same in torch, and their meaning.

Each program reads a part of one matrix once, and writes its sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_laer.verify.sums import FIRST_SIGN, MULTIPLIER, SHIFT, SIGNS

_BLOCK, _BLOCKS = 2048, 16


def bit_sums(bits_NP: torch.Tensor, first: int) -> torch.Tensor:
    """Return the sums of parts of each row, int64 `[N, parts]`."""
    sums = _sums(bits_NP, first, torch.int64, 1, _bit_sums, {})
    return sums.squeeze(2)


def signed_sums(floats_NP: torch.Tensor, first: int) -> torch.Tensor:
    """Return the sums of parts of each row, float64 `[N, parts, 5]`."""
    constants = {"FIRST_SIGN": FIRST_SIGN, "SIGNS": SIGNS}
    return _sums(floats_NP, first, torch.float64, SIGNS + 1, _signed_sums, constants)


def _sums(
    values_NP: torch.Tensor,
    first: int,
    dtype: torch.dtype,
    number: int,
    kernel: Any,
    constants: dict[str, int],
) -> torch.Tensor:
    rows, elements = values_NP.shape
    assert elements <= 1 or values_NP.stride(1) == 1, "elements of a row lie apart"
    parts = max(1, triton.cdiv(elements, _BLOCK * _BLOCKS))
    sums = torch.empty(rows, parts, number, dtype=dtype, device=values_NP.device)
    if rows:
        given = values_NP, sums, first, elements, values_NP.stride(0), parts
        sizes = {"BLOCK": _BLOCK, "BLOCKS": _BLOCKS, "MULTIPLIER": MULTIPLIER, "SHIFT": SHIFT}
        kernel[(rows * parts,)](*given, **sizes, **constants)
    return sums


@triton.jit(
    do_not_specialize=["first", "elements", "stride", "parts"],
    # Experts of 3 x 5 numbers in bfloat16 follow each other on odd places.
    do_not_specialize_on_alignment=["bits", "sums"],
)
def _bit_sums(
    bits,
    sums,
    first,
    elements,
    stride,
    parts,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Sum a part of one row, which has up to BLOCKS blocks."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros([BLOCK], tl.int64)
    for block in range(tl.minimum(BLOCKS, tl.cdiv(elements - begin, BLOCK))):
        place = begin + block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(bits + row * stride + place, mask=place < elements, other=0).to(tl.int64)
        number = (place + first) * MULTIPLIER
        number = (number ^ (number >> SHIFT)) | 1
        total += value * number
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit(
    do_not_specialize=["first", "elements", "stride", "parts"],
    do_not_specialize_on_alignment=["floats", "sums"],
)
def _signed_sums(
    floats,
    sums,
    first,
    elements,
    stride,
    parts,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    SHIFT: tl.constexpr,
    FIRST_SIGN: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Sum a part of one row with each sign, and its squares."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * (BLOCK * BLOCKS)
    # By place in a block; one column for each sign, one of squares, and up to a power of two.
    column = tl.arange(0, 8)[None, :].to(tl.int64)
    total = tl.zeros([BLOCK, 8], tl.float64)
    for block in range(tl.minimum(BLOCKS, tl.cdiv(elements - begin, BLOCK))):
        place = begin + block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(floats + row * stride + place, mask=place < elements, other=0)
        value = value.to(tl.float64)[:, None]
        number = (place + first) * MULTIPLIER
        number = ((number ^ (number >> SHIFT)) | 1) * MULTIPLIER
        sign = 1 - 2 * ((number[:, None] >> tl.minimum(FIRST_SIGN + column, 63)) & 1)
        total += tl.where(column < SIGNS, value * sign, value * value)
    at = tl.program_id(0) * (SIGNS + 1) + tl.arange(0, 8)
    tl.store(sums + at, tl.sum(total, axis=0), mask=tl.arange(0, 8) <= SIGNS)
