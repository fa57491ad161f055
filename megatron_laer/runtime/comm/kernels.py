"""Triton kernels that copy and sum segments of rows; `segments` has the torch code of each.

Every result has one writer, so nothing is atomic and bits never depend on timing. Programs share
the elements of one segment, whose start is computed in 64 bits. Tensors of a holding are found by
their distances to the first one, so that a copy or a sum has one launch. Numbers that change with
layouts are not specialised, so that no kernel is compiled again during training. Each segment is
moved by 16 bytes if its own begin and size allow that, so that an odd tensor makes itself slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.segments import Held, Segments

_BLOCK_COPIED = 4096
_BLOCK_SUMMED = 1024


# A table on the device, and where it has the distances of a holding's tensors to the first one, in
# elements.
Numbers = tuple[torch.Tensor, int]


def copy_segments(
    held: Held, wire: torch.Tensor, numbers: Numbers, segments: Segments, *, packs: bool
) -> None:
    """Copy segments between the tensors of the holding and the wire."""
    programs, columns = _sizes(held, wire, segments, _BLOCK_COPIED)
    given = held[0], wire, *numbers, segments.at, programs
    constants = {"COLUMNS": columns, "PACKS": packs, "BLOCK": _BLOCK_COPIED}
    _copy_segments[(programs * segments.number,)](*given, **constants)


def sum_segments(
    held: Held, wire: torch.Tensor, numbers: Numbers, segments: Segments, *, adds: bool
) -> None:
    """Sum segments of the wire into or onto the tensors of the holding."""
    programs, columns = _sizes(held, wire, segments, _BLOCK_SUMMED)
    first_sum = segments.at + 4 * segments.number
    given = held[0], wire, *numbers, segments.at, first_sum, programs
    constants = {"COLUMNS": columns, "ADDS": adds, "BLOCK": _BLOCK_SUMMED}
    _sum_segments[(programs * segments.sums,)](*given, **constants)


def _sizes(held: Held, wire: torch.Tensor, segments: Segments, block: int) -> tuple[int, int]:
    """Return the programs of each segment, and the columns of its rows."""
    assert wire.is_contiguous() and all(tensor.is_contiguous() for tensor in held)
    columns, elements = wire.shape[1], segments.most_rows * wire.shape[1]
    assert elements <= 2**31 - block, f"a segment has {elements} elements, not below 2^31"
    return triton.cdiv(elements, block), columns


@triton.jit
def _load(memory, at, element, size):
    """Load a block of a segment, by 16 bytes where its begin and size allow that."""
    WIDTH: tl.constexpr = 128 // memory.dtype.element_ty.primitive_bitwidth
    if (at % WIDTH == 0) & (size % WIDTH == 0):
        # The compiler sees these multiples.
        begin, end = at // WIDTH * WIDTH, size // WIDTH * WIDTH
        value = tl.load(memory + begin + element, mask=element < end, other=0)
    else:
        value = tl.load(memory + at + element, mask=element < size, other=0)
    return value


@triton.jit
def _store(memory, at, element, size, value):
    WIDTH: tl.constexpr = 128 // memory.dtype.element_ty.primitive_bitwidth
    if (at % WIDTH == 0) & (size % WIDTH == 0):
        begin, end = at // WIDTH * WIDTH, size // WIDTH * WIDTH
        tl.store(memory + begin + element, value, mask=element < end)
    else:
        tl.store(memory + at + element, value, mask=element < size)


@triton.jit(do_not_specialize=["places", "at", "programs"])
def _copy_segments(
    held,
    wire,
    table,
    places,
    at,
    programs,
    COLUMNS: tl.constexpr,
    PACKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a block of one segment."""
    segment = table + at + 4 * (tl.program_id(0) // programs)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    in_held = tl.load(table + places + tl.load(segment)) + tl.load(segment + 1) * COLUMNS
    in_wire, size = tl.load(segment + 2) * COLUMNS, tl.load(segment + 3) * COLUMNS
    if PACKS:
        _store(wire, in_wire, element, size, _load(held, in_held, element, size))
    else:
        _store(held, in_held, element, size, _load(wire, in_wire, element, size))


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
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a block of the segments of one sum."""
    first = table + first_sum + tl.program_id(0) // programs
    segment = table + at + 4 * tl.load(first)
    element = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(segment + 3) * COLUMNS
    total = _load(wire, tl.load(segment + 2) * COLUMNS, element, size).to(tl.float32)
    for other in range(tl.load(first) + 1, tl.load(first + 1)):
        in_wire = tl.load(table + at + 4 * other + 2) * COLUMNS
        total += _load(wire, in_wire, element, size).to(tl.float32)
    in_held = tl.load(table + places + tl.load(segment)) + tl.load(segment + 1) * COLUMNS
    if ADDS:
        total = _load(held, in_held, element, size).to(tl.float32) + total
    _store(held, in_held, element, size, total.to(held.dtype.element_ty))
