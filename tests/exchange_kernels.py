"""Triton kernels of the exchange equal torch, in Triton's interpreter or on a card.

`TRITON_INTERPRET=1 python -m tests.exchange_kernels` checks them on the CPU. Triton reads this at
import, so tests start a process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import kernels, segments
from megatron_laer.runtime.comm.segments import Segments, upload_tables

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The hottest of 8 experts has 21 replicas.
HOT = ExpertLayout.from_slots(
    32, 2, 8, [slot for n in range(32) for slot in (0 if n < 21 else 1 + n % 7, 1 + (n + 1) % 7)]
)
# Rows of each tensor of a holding, their number, and columns: those that fill blocks of either
# kernel, and that do not.
SIZES = [(5, 1, 7), (8, 3, 16), (7, 2, 1030), (8, 1, 512), (20, 2, 515), (67, 1, 65), (8, 4, 1)]


def draw(rows: int, tensors: int, seed: int, *, parts: int) -> Segments:
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
    given = first_Z[order_Z], ends_Z - size_Z[order_Z], size_Z[order_Z]
    return Segments.of(*given, rows, CPU)


def by_kernels(part: Segments, device: torch.device) -> Segments:
    """Return the same segments, to be moved by kernels."""
    sorted_Z = part.held_Z, part.wire_Z, part.size_Z
    mine = Segments(*sorted_Z, part.tensor_rows, part.in_place, device)
    upload_tables([mine])
    return mine


def check_copies(rows: int, tensors: int, columns: int, dtype: torch.dtype, device: str) -> None:
    """Pack segments and unpack others; all other memory must stay unchanged."""
    part = draw(rows, tensors, rows + columns, parts=1)
    mine, on_wire = by_kernels(part, torch.device(device)), int(part.size_Z.sum())
    held = [numbered(rows, columns, dtype=dtype, first=at) for at in range(tensors)]
    held_there = [one.to(device, copy=True) for one in held]
    wire = numbered(on_wire + 3, columns, dtype=dtype, first=7)
    wire_there = wire.to(device, copy=True)
    part.pack(held, wire)
    mine.pack(held_there, wire_there)
    equal([wire_there], [wire])
    wire.add_(1), wire_there.add_(1)
    part.unpack(wire, held)
    mine.unpack(wire_there, held_there)
    equal(held_there, held)


def check_sums(
    size: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    """Sum segments, into new memory and onto existing sums."""
    rows, tensors, columns = size
    part = draw(rows, tensors, rows + columns, parts=5)
    mine = by_kernels(part, torch.device(device))
    generator = torch.Generator().manual_seed(1)
    wire = torch.randn(int(part.size_Z.sum()), columns, generator=generator).to(dtypes[0])
    for adds in (False, True):
        held = [
            torch.randn(rows, columns, generator=generator).to(dtypes[1]) for _ in range(tensors)
        ]
        held_there = [one.to(device, copy=True) for one in held]
        part.add(wire, held, adds=adds)
        mine.add(wire.to(device), held_there, adds=adds)
        equal(held_there, held)


def check_far_apart(device: str) -> None:
    """Find elements beyond the first 2**31."""
    columns, last = 4096, (1 << 19) + 2
    far = torch.empty(last + 1, columns, dtype=torch.float16, device=device)
    far[0], far[-1] = 1, 2
    given = np.array([0, 1, 1]), np.array([last, 0, last]), np.ones(3, np.int64)
    sums = by_kernels(Segments.of(*given, 2, CPU), torch.device(device))
    out = torch.zeros(2, columns, device=device)
    sums.add(far, [out], adds=False)
    assert out.unique(dim=1).tolist() == [[2.0], [3.0]]

    one, there = torch.full((1, columns), 5.0, dtype=torch.float16, device=device), last - 1
    given = np.zeros(1, np.int64), np.array([there]), np.ones(1, np.int64)
    copy = by_kernels(Segments.of(*given, 1, CPU), torch.device(device))
    copy.pack([one], far)
    assert far[there].unique().tolist() == [5] and far[last].unique().tolist() == [2]
    copy.unpack(far.add_(1), [one])
    assert one.unique().tolist() == [6]


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
    with mock.patch.object(segments, "exchange_kernels", lambda _: kernels):
        for size in SIZES:
            for dtype in (torch.uint8, fp16, fp32):
                check_copies(*size, dtype, device)
            for pair in dtypes:
                check_sums(size, pair, device)
        check_far_apart(device)
    return len(SIZES) * (3 + len(dtypes)) + 1


if __name__ == "__main__":
    print(f"{check_all('cpu')} cases")
