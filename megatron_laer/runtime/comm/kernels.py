"""Triton kernels that copy and sum segments of rows; `segments` has the torch code of each.

Every result has one writer, so nothing is atomic and bits never depend on timing. Programs share
the elements of one segment, whose start is computed in 64 bits. Tensors of a holding are found by
their distances to the first one, so that a copy or a sum has one launch. Numbers that change with
layouts are not specialised, so that no kernel is compiled again during training. Columns and the
tensors' alignment are: programs move as many bytes at once as these allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.segments import Held, Segments

_BLOCK_COPIED = 4096
_BLOCK_SUMMED = 1024
_ALIGNMENT = 16  # of memory, in bytes


def copy_segments(
    held: Held,
    wire: torch.Tensor,
    table: torch.Tensor,
    places: int,
    segments: Segments,
    *,
    packs: bool,
) -> None:
    """Copy segments between the tensors of the holding and the wire.

    Args:
        places: where the table has the distances of the tensors to the first one, in elements.
    """
    programs, columns, alignment = _common(held, wire, segments, _BLOCK_COPIED)
    _copy_segments[(programs * segments.number,)](
        held[0],
        wire,
        table,
        places,
        segments.at,
        programs,
        COLUMNS=columns,
        ALIGNMENT=alignment,
        PACKS=packs,
        BLOCK=_BLOCK_COPIED,
    )


def sum_segments(
    held: Held,
    wire: torch.Tensor,
    table: torch.Tensor,
    places: int,
    segments: Segments,
    *,
    adds: bool,
) -> None:
    """Sum segments of the wire into or onto the tensors of the holding; `places` as above."""
    programs, columns, alignment = _common(held, wire, segments, _BLOCK_SUMMED)
    _sum_segments[(programs * segments.sums,)](
        held[0],
        wire,
        table,
        places,
        segments.at,
        segments.at + 4 * segments.number,
        programs,
        COLUMNS=columns,
        ALIGNMENT=alignment,
        ADDS=adds,
        BLOCK=_BLOCK_SUMMED,
    )


def _common(held: Held, wire: torch.Tensor, segments: Segments, block: int) -> tuple[int, int, int]:
    """Return programs per segment, columns, and the elements to which tensors are aligned."""
    columns, elements = wire.shape[1], segments.most_rows * wire.shape[1]
    assert elements <= 2**31 - block, f"a segment has {elements} elements, not below 2^31"
    assert wire.is_contiguous()
    is_aligned = True
    for tensor in held:
        assert tensor.is_contiguous()
        is_aligned &= tensor.data_ptr() % _ALIGNMENT == 0
    alignment = _ALIGNMENT // held[0].element_size() if is_aligned else 1
    return triton.cdiv(elements, block), columns, alignment


@triton.jit(do_not_specialize=["places", "at", "programs"])
def _copy_segments(
    held,
    wire,
    table,
    places,
    at,
    programs,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PACKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a block of one segment."""
    segment = table + at + 4 * (tl.program_id(0) // programs)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.load(segment + 3) * COLUMNS
    place = tl.multiple_of(tl.load(table + places + tl.load(segment)), ALIGNMENT)
    in_held = held + place + tl.load(segment + 1) * COLUMNS + element
    in_wire = wire + tl.load(segment + 2) * COLUMNS + element
    if PACKS:
        tl.store(in_wire, tl.load(in_held, mask=inside), mask=inside)
    else:
        tl.store(in_held, tl.load(in_wire, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["places", "at", "first_sum", "programs"])
def _sum_segments(
    held,
    wire,
    table,
    places,
    at,
    first_sum,
    programs,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a block of the segments of one sum."""
    first = table + first_sum + tl.program_id(0) // programs
    segment = table + at + 4 * tl.load(first)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.load(segment + 3) * COLUMNS
    part = wire + tl.load(segment + 2) * COLUMNS + element
    total = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    for other in range(tl.load(first) + 1, tl.load(first + 1)):
        part = wire + tl.load(table + at + 4 * other + 2) * COLUMNS + element
        total += tl.load(part, mask=inside, other=0.0).to(tl.float32)
    place = tl.multiple_of(tl.load(table + places + tl.load(segment)), ALIGNMENT)
    target = held + place + tl.load(segment + 1) * COLUMNS + element
    if ADDS:
        total = tl.load(target, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(target, total.to(held.dtype.element_ty), mask=inside)
