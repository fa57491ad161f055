"""Triton kernels of the exchange equal torch, in Triton's interpreter or on a card.

`TRITON_INTERPRET=1 python -m tests.exchange_kernels` checks them on the CPU. Triton reads this at
import, so tests start a process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import kernels, segments
from megatron_laer.runtime.comm.segments import Segments, Table

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The hottest of 8 experts has 21 replicas.
HOT = ExpertLayout.from_slots(
    32, 2, 8, [slot for n in range(32) for slot in (0 if n < 21 else 1 + n % 7, 1 + (n + 1) % 7)]
)
# Rows of each tensor of a holding, their number, and columns: those that fill blocks of either
# kernel, and that do not.
SIZES = [(5, 1, 7), (8, 3, 16), (7, 2, 1030), (8, 1, 512), (20, 2, 515), (67, 1, 65), (8, 4, 1)]


# A table, segments in it, and the tensors of a holding that have any, by which they are numbered.
Drawn = tuple[Any, Segments, list[int]]


def segments_of(held_Z: Any, wire_Z: Any, size_Z: Any, tensor_rows: int) -> Drawn:
    """Return segments of tensors that have as many rows each."""
    order_Z = np.argsort(held_Z, kind="stable")
    first_T = np.unique(held_Z[order_Z], return_index=True)[1]
    tensor_Z, row_Z = np.divmod(held_Z[order_Z], tensor_rows)
    tensors, tensor_Z = np.unique(tensor_Z, return_inverse=True)
    rows_Z4 = np.stack([tensor_Z, row_Z, wire_Z[order_Z], size_Z[order_Z]], axis=1)
    table = np.concatenate([[-1], rows_Z4.ravel(), first_T, [len(rows_Z4)]])
    sizes = len(rows_Z4), len(first_T), int(size_Z.sum()), int(size_Z.max(initial=0))
    return table, Segments(1, *sizes, in_place=None), tensors.tolist()


def draw(rows: int, tensors: int, seed: int, *, parts: int) -> Drawn:
    """Cut the rows of a holding at random places, and give each segment up to `parts` on the wire.

    Some have none.
    """
    rng = np.random.default_rng(seed)
    cuts = np.unique(rng.integers(1, rows, size=4)) if rows > 1 else np.empty(0, np.int64)
    bounds = np.concatenate(([0], cuts, [rows]))
    first_Z = np.add.outer(np.arange(tensors) * rows, bounds[:-1]).ravel()
    size_Z = np.tile(np.diff(bounds), tensors)
    times_Z = rng.integers(0, parts + 1, first_Z.size)
    order_Z = rng.permutation(np.repeat(np.arange(first_Z.size), times_Z))
    ends_Z = np.cumsum(size_Z[order_Z])
    return segments_of(first_Z[order_Z], ends_Z - size_Z[order_Z], size_Z[order_Z], rows)


def tables_of(numbers: Any, device: str) -> tuple[Table, Table]:
    """Return a table whose segments torch moves, and one whose segments kernels move."""
    with mock.patch.object(segments, "exchange_kernels", lambda _: kernels):
        by_kernels = Table(numbers, torch.device(device))
    return Table(numbers, CPU), by_kernels


def check_copies(rows: int, tensors: int, columns: int, dtype: torch.dtype, device: str) -> None:
    """Pack segments and unpack others; all other memory must stay unchanged."""
    numbers, part, used = draw(rows, tensors, rows + columns, parts=1)
    theirs, mine = tables_of(numbers, device)
    held = [numbered(rows, columns, dtype=dtype, first=at) for at in range(tensors)]
    held_there = [copied(one, device, odd=at % 2) for at, one in enumerate(held)]
    wire = numbered(part.rows + 3, columns, dtype=dtype, first=7)
    wire_there = wire.to(device, copy=True)
    theirs.pack(part, [held[at] for at in used], wire)
    placed = [held_there[at] for at in used]
    mine.place(placed)
    mine.pack(part, placed, wire_there)
    equal([wire_there], [wire])
    wire.add_(1), wire_there.add_(1)
    theirs.unpack(part, wire, [held[at] for at in used])
    mine.unpack(part, wire_there, placed)
    equal(held_there, held)


def check_sums(
    size: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    """Sum segments, into new memory and onto existing sums."""
    rows, tensors, columns = size
    numbers, part, used = draw(rows, tensors, rows + columns, parts=5)
    theirs, mine = tables_of(numbers, device)
    generator = torch.Generator().manual_seed(1)
    wire = torch.randn(part.rows, columns, generator=generator).to(dtypes[0])
    for adds in (False, True):
        held = [
            torch.randn(rows, columns, generator=generator).to(dtypes[1]) for _ in range(tensors)
        ]
        held_there = [copied(one, device, odd=at % 2) for at, one in enumerate(held)]
        theirs.add(part, wire, [held[at] for at in used], adds=adds)
        placed = [held_there[at] for at in used]
        mine.place(placed)
        mine.add(part, wire.to(device), placed, adds=adds)
        equal(held_there, held)


def check_far_apart(device: str) -> None:
    """Find elements beyond the first 2**31."""
    columns, last = 4096, (1 << 19) + 2
    far = torch.empty(last + 1, columns, dtype=torch.float16, device=device)
    far[0], far[-1] = 1, 2
    given = np.array([0, 1, 1]), np.array([last, 0, last]), np.ones(3, np.int64)
    numbers, sums, _ = segments_of(*given, 2)
    table = tables_of(numbers, device)[1]
    out = torch.zeros(2, columns, device=device)
    table.place([out])
    table.add(sums, far, [out], adds=False)
    assert out.unique(dim=1).tolist() == [[2.0], [3.0]]

    one, there = torch.full((1, columns), 5.0, dtype=torch.float16, device=device), last - 1
    given = np.zeros(1, np.int64), np.array([there]), np.ones(1, np.int64)
    numbers, copy, _ = segments_of(*given, 1)
    table = tables_of(numbers, device)[1]
    table.place([one])
    table.pack(copy, [one], far)
    assert far[there].unique().tolist() == [5] and far[last].unique().tolist() == [2]
    table.unpack(copy, far.add_(1), [one])
    assert one.unique().tolist() == [6]


def check_longest(device: str) -> None:
    """Refuse segments whose elements do not fit in 32 bits, before anything is launched."""
    there = torch.zeros(1, 4, device=device)
    table = torch.zeros(1, dtype=torch.int64, device=device)
    longest = Segments(0, 1, 1, 1, 2**29 + 1, in_place=None)
    for launch in (
        lambda: kernels.copy_segments([there], there, (table, 0), longest, packs=True),
        lambda: kernels.sum_segments([there], there, (table, 0), longest, adds=True),
    ):
        try:
            launch()
        except AssertionError as error:
            assert "a segment has 2147483652 elements" in str(error)
        else:
            raise ValueError("a segment that is too long was launched")


def copied(tensor: torch.Tensor, device: str, *, odd: int) -> torch.Tensor:
    """Return a copy that begins this many elements behind aligned memory."""
    memory = torch.empty(tensor.numel() + odd, dtype=tensor.dtype, device=device)
    return memory[odd:].view(tensor.shape).copy_(tensor)


def numbered(rows: int, columns: int, *, dtype: torch.dtype, first: int) -> torch.Tensor:
    count = torch.arange(first, first + rows * columns)
    return (count % 2039).to(dtype).view(rows, columns)


def equal(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


def check_all(device: str) -> int:
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    dtypes = [(fp16, fp16), (bf16, fp32), (fp32, fp32), (fp32, fp16)]
    # The interpreter truncates float32 to bfloat16 where a card rounds.
    dtypes += [(bf16, bf16), (fp32, bf16)] if not INTERPRETED else []
    for size in SIZES:
        for dtype in (torch.uint8, fp16, fp32):
            check_copies(*size, dtype, device)
        for pair in dtypes:
            check_sums(size, pair, device)
    check_far_apart(device)
    check_longest(device)
    return len(SIZES) * (3 + len(dtypes)) + 2


if __name__ == "__main__":
    print(f"{check_all('cpu')} cases")
