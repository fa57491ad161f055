"""Triton kernels that copy and sum segments of rows; `segments` has the torch code of each.

Every result has one writer, so nothing is atomic and bits never depend on timing. Programs share
the elements of one segment, whose start is computed in 64 bits. Numbers that change with layouts
are not specialised, so that no kernel is compiled again during training. Columns are: programs move
as many bytes at once as these are aligned to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.segments import Part, Segments

_BLOCK_COPIED = 4096
_BLOCK_SUMMED = 1024


def copy_segments(
    held: torch.Tensor,
    wire: torch.Tensor,
    table: torch.Tensor,
    segments: Segments,
    part: Part,
    *,
    packs: bool,
) -> None:
    """Copy a part of segments between its tensor of the holding and the wire."""
    columns = held.shape[1]
    assert held.is_contiguous() and wire.is_contiguous()
    programs = triton.cdiv(segments.most_rows * columns, _BLOCK_COPIED)
    numbers = segments.at + 3 * part.first, programs
    _copy_segments[(programs * part.segments,)](
        held, wire, table, *numbers, COLUMNS=columns, PACKS=packs, BLOCK=_BLOCK_COPIED
    )


def sum_segments(
    wire: torch.Tensor,
    table: torch.Tensor,
    held: torch.Tensor,
    segments: Segments,
    part: Part,
    *,
    adds: bool,
) -> None:
    """Sum a part of segments of the wire into or onto its tensor of the holding."""
    columns = held.shape[1]
    assert held.is_contiguous() and wire.is_contiguous()
    programs = triton.cdiv(segments.most_rows * columns, _BLOCK_SUMMED)
    first_sum = segments.at + 3 * segments.number + part.first_sum
    numbers = segments.at, first_sum, programs
    _sum_segments[(programs * part.sums,)](
        wire, held, table, *numbers, COLUMNS=columns, ADDS=adds, BLOCK=_BLOCK_SUMMED
    )


@triton.jit(do_not_specialize=["at", "programs"])
def _copy_segments(
    held, wire, table, at, programs, COLUMNS: tl.constexpr, PACKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy a block of one segment."""
    segment = table + at + 3 * (tl.program_id(0) // programs)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.load(segment + 2) * COLUMNS
    in_held = held + tl.load(segment) * COLUMNS + element
    in_wire = wire + tl.load(segment + 1) * COLUMNS + element
    if PACKS:
        tl.store(in_wire, tl.load(in_held, mask=inside), mask=inside)
    else:
        tl.store(in_held, tl.load(in_wire, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["at", "first_sum", "programs"])
def _sum_segments(
    wire,
    held,
    table,
    at,
    first_sum,
    programs,
    COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a block of the segments of one sum."""
    first = table + first_sum + tl.program_id(0) // programs
    segment = table + at + 3 * tl.load(first)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.load(segment + 2) * COLUMNS
    part = wire + tl.load(segment + 1) * COLUMNS + element
    total = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    for other in range(tl.load(first) + 1, tl.load(first + 1)):
        part = wire + tl.load(table + at + 3 * other + 1) * COLUMNS + element
        total += tl.load(part, mask=inside, other=0.0).to(tl.float32)
    target = held + tl.load(segment) * COLUMNS + element
    if ADDS:
        total = tl.load(target, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(target, total.to(held.dtype.element_ty), mask=inside)
