"""Triton kernel of the sums of bits; `sums` has the same in torch, and its meaning.

Each program reads a part of one matrix once, and writes one integer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.verify.sums import MULTIPLIER, SHIFT

_BLOCK, _BLOCKS = 2048, 16


def bit_sums(bits_NP: torch.Tensor, first: int) -> torch.Tensor:
    """Return the sums of parts of each row, int64 `[N, parts]`."""
    rows, elements = bits_NP.shape
    assert elements <= 1 or bits_NP.stride(1) == 1, "elements of a row lie apart"
    parts = max(1, triton.cdiv(elements, _BLOCK * _BLOCKS))
    sums = torch.empty(rows, parts, dtype=torch.int64, device=bits_NP.device)
    if rows:
        given = bits_NP, sums, first, elements, bits_NP.stride(0), parts
        constants = {"BLOCK": _BLOCK, "BLOCKS": _BLOCKS, "MULTIPLIER": MULTIPLIER, "SHIFT": SHIFT}
        _bit_sums[(rows * parts,)](*given, **constants)
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
    for block in range(BLOCKS):
        place = begin + block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(bits + row * stride + place, mask=place < elements, other=0).to(tl.int64)
        number = (place + first) * MULTIPLIER
        number = (number ^ (number >> SHIFT)) | 1
        total += value * number
    tl.store(sums + tl.program_id(0), tl.sum(total))
