"""Triton kernels that copy and sum segments of rows; `segments` has the torch code of each.

Every result has one writer, so nothing is atomic and bits never depend on timing. Programs share
the elements of one segment, whose start is computed in 64 bits. Numbers that change with layouts
are not specialised, nor is the alignment of tables, so that no kernel is compiled again during
training.

Legend: K columns, Z segments, T sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.segments import Table

_BLOCK_COPIED = 4096
_BLOCK_SUMMED = 1024


def copy_segments(
    held: torch.Tensor,
    wire: torch.Tensor,
    table: Table,
    base: int,
    part: slice,
    most: int,
    *,
    packs: bool,
) -> None:
    """Copy a part of the table's segments between `held`, whose first row is `base`, and `wire`.

    No segment has more than `most` rows.
    """
    columns = held.shape[1]
    assert held.is_contiguous() and wire.is_contiguous()
    programs = triton.cdiv(most * columns, _BLOCK_COPIED)
    _copy_segments[(programs * (part.stop - part.start),)](
        held,
        wire,
        table.held_Z,
        table.wire_Z,
        table.size_Z,
        base,
        part.start,
        programs,
        columns,
        PACKS=packs,
        BLOCK=_BLOCK_COPIED,
    )


def sum_segments(
    wire: torch.Tensor,
    table: Table,
    held: torch.Tensor,
    base: int,
    sums: slice,
    most: int,
    *,
    adds: bool,
) -> None:
    """Sum segments of `wire` into or onto `held`, whose first row is `base`."""
    columns = held.shape[1]
    assert held.is_contiguous() and wire.is_contiguous()
    programs = triton.cdiv(most * columns, _BLOCK_SUMMED)
    _sum_segments[(programs * (sums.stop - sums.start),)](
        wire,
        held,
        table.held_Z,
        table.wire_Z,
        table.size_Z,
        table.first_T1,
        base,
        sums.start,
        programs,
        columns,
        ADDS=adds,
        BLOCK=_BLOCK_SUMMED,
    )


_TABLE = ["held_Z", "wire_Z", "size_Z", "first_T1"]
_OF_LAYOUTS = ["base", "first", "programs"]


@triton.jit(do_not_specialize=_OF_LAYOUTS, do_not_specialize_on_alignment=_TABLE[:3])
def _copy_segments(
    held,
    wire,
    held_Z,
    wire_Z,
    size_Z,
    base,
    first,
    programs,
    columns,
    PACKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a block of one segment."""
    segment = first + tl.program_id(0) // programs
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(size_Z + segment) * columns
    in_held = held + (tl.load(held_Z + segment) - base) * columns + at
    in_wire = wire + tl.load(wire_Z + segment) * columns + at
    if PACKS:
        tl.store(in_wire, tl.load(in_held, mask=inside), mask=inside)
    else:
        tl.store(in_held, tl.load(in_wire, mask=inside), mask=inside)


@triton.jit(do_not_specialize=_OF_LAYOUTS, do_not_specialize_on_alignment=_TABLE)
def _sum_segments(
    wire,
    held,
    held_Z,
    wire_Z,
    size_Z,
    first_T1,
    base,
    first,
    programs,
    columns,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a block of the segments of one sum."""
    number = first + tl.program_id(0) // programs
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(first_T1 + number)
    inside = at < tl.load(size_Z + segment) * columns
    part = wire + tl.load(wire_Z + segment) * columns + at
    total = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    for other in range(segment + 1, tl.load(first_T1 + number + 1)):
        part = wire + tl.load(wire_Z + other) * columns + at
        total += tl.load(part, mask=inside, other=0.0).to(tl.float32)
    sums = held + (tl.load(held_Z + segment) - base) * columns + at
    if ADDS:
        total = tl.load(sums, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(sums, total.to(held.dtype.element_ty), mask=inside)
