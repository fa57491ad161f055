"""Triton kernels of the exchange equal torch, in Triton's interpreter or on a card.

`TRITON_INTERPRET=1 python -m tests.exchange_kernels` checks them on the CPU. Triton reads this at
import, so tests start a process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import kernels, rows
from megatron_laer.runtime.comm.blocks import RowBlocks, row_blocks
from megatron_laer.runtime.comm.reduce import reduce_index
from megatron_laer.runtime.comm.rows import ReplicaSums
from tests.placed import placed

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Size(NamedTuple):
    """Matrix of R × K over nodes of G ranks each."""

    ranks: int
    node_size: int
    rows: int
    columns: int

    @property
    def blocks(self) -> RowBlocks:
        return row_blocks(self.rows, self.ranks, self.node_size)


# Flat, by nodes, and one rank. Rows that divide by N, that do not, and fewer than ranks. Columns
# that fill blocks of either kernel, and that do not.
SIZES = [
    Size(1, 1, 5, 7),
    Size(4, 4, 8, 16),
    Size(4, 4, 7, 1030),
    Size(4, 2, 8, 512),
    Size(4, 2, 7, 33),
    Size(6, 2, 20, 515),
    Size(6, 3, 4, 5),
    Size(3, 1, 8, 1),
    Size(8, 4, 67, 65),
]
# The hottest of 8 experts has 21 replicas.
HOT = ExpertLayout.from_slots(
    32, 2, 8, [slot for n in range(32) for slot in (0 if n < 21 else 1 + n % 7, 1 + (n + 1) % 7)]
)
# Every expert once, one expert only, experts that do not divide by N, more of them, a hot one.
LAYOUTS = [
    ExpertLayout.static(1, 1, 1),
    ExpertLayout.static(4, 1, 1),
    ExpertLayout.random(8, 4, 6, (3,)),
    ExpertLayout.random(3, 11, 17, (1,)),
    HOT,
]


def check_move(size: Size, slots: int, dtype: torch.dtype, device: torch.device) -> None:
    """Pack some slots and unpack others; all other memory must stay unchanged."""
    for first, capacity in ((0, slots), (2, slots + 3)):
        blocks = size.blocks
        whole_CRK = numbered(slots, size.rows, size.columns, dtype=dtype)
        sent = numbered(capacity, size.rows, size.columns, dtype=dtype).view(-1)
        for packs, copy in ((True, rows.pack_rows), (False, rows.unpack_rows)):
            theirs = whole_CRK.clone(), sent.clone()
            mine = whole_CRK.to(device, copy=True), sent.to(device, copy=True)
            copy(*theirs, blocks, first, capacity)
            kernels.move_rows(*mine, blocks, first, capacity, packs=packs)
            equal(mine, theirs)


def check_gather(size: Size, fetched: int, shared: int, device: torch.device) -> None:
    """Gather experts that arrived, some twice and some not at all."""
    for local_rank in {0, size.node_size - 1}:
        blocks, number = size.blocks, fetched + shared
        together = blocks.rows_G[local_rank]
        arrived = numbered(number, together, size.columns, dtype=torch.float16).view(-1)
        position_n = torch.randint(number, (number + 2,), generator=seeded())
        theirs = torch.full((number + 2, together, size.columns), -1.0, dtype=torch.float16)
        mine = theirs.to(device, copy=True)
        rows.gather_rows(arrived, position_n, fetched, shared, theirs, blocks, local_rank)
        placed = arrived.to(device), position_n.to(device)
        kernels.gather_rows(*placed, fetched, mine, blocks, local_rank)
        equal([mine], [theirs])


def check_sum(
    sums: ReplicaSums, size: Size, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Sum the rows of each local rank, into new memory and onto existing sums."""
    dtype, out_dtype = dtypes
    parts = len(sums.csr) - sums.num_targets - 1
    on_device = ReplicaSums(sums.num_targets, sums.csr, sums.uploaded.to(device))
    for local_rank in {0, size.node_size - 1}:
        blocks = size.blocks
        together = blocks.rows_G[local_rank]
        parts_nPK = torch.randn(parts, together, size.columns, generator=seeded()).to(dtype)
        out_shape = (sums.num_targets * together * size.columns,)
        for adds in (False, True):
            theirs = torch.randn(out_shape, generator=seeded()).to(out_dtype)
            mine = theirs.to(device, copy=True)
            rows.sum_replicas(parts_nPK, sums, theirs, blocks, local_rank, adds=adds)
            kernels.sum_replicas(
                parts_nPK.to(device), on_device, mine, blocks, local_rank, adds=adds
            )
            equal([mine], [theirs])


def check_far_apart(device: torch.device) -> None:
    """Find elements beyond the first 2**31."""
    rows_K, parts = 4096, (1 << 19) + 3
    far = torch.empty(parts, 1, rows_K, dtype=torch.float16, device=device)
    far[0], far[-1] = 1, 2
    csr = np.array([3, 4, 6, parts - 1, 0, parts - 1])
    sums = ReplicaSums(2, csr, torch.from_numpy(csr).to(device))
    out = torch.zeros(2, 1, rows_K, device=device)
    kernels.sum_replicas(far, sums, out, row_blocks(1, 1, 1), 0)
    assert out.unique(dim=2).tolist() == [[[2.0]], [[3.0]]]

    whole = torch.full((1, 1, rows_K), 5.0, dtype=torch.float16, device=device)
    kernels.move_rows(whole, far.view(-1), row_blocks(1, 1, 1), parts - 2, parts, packs=True)
    assert far[-2].unique().tolist() == [5] and far[-1].unique().tolist() == [2]

    target = torch.empty(1, 1, rows_K, dtype=torch.float16, device=device)
    last = torch.tensor([parts - 1], device=device)
    kernels.gather_rows(far.view(-1), last, parts, target, row_blocks(1, 1, 1), 0)
    assert target.unique().tolist() == [2]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def numbered(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    count = int(np.prod(shape))
    return (torch.arange(count) % 2039).to(dtype).view(shape)


def equal(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


def replica_sums() -> list[ReplicaSums]:
    """Return the sums of all layouts, of one node and of the first of two."""
    found = []
    for layout in LAYOUTS:
        ranks = layout.num_ranks
        found.append(reduce_index(placed(layout), ranks, 0, CPU).intra_node)
        if ranks % 2 == 0:
            index = reduce_index(placed(layout), ranks // 2, 0, CPU)
            assert index.inter_node is not None
            found += [index.intra_node, index.inter_node]
    return found


def check_all(device: torch.device) -> int:
    cases = 0
    for size in SIZES:
        check_move(size, 2, torch.float16, device)
        cases += 1
        for fetched, shared in ((4, 0), (0, 2), (3, 2)):
            check_gather(size, fetched, shared, device)
            cases += 1
    check_move(SIZES[2], 2, torch.float32, device)
    check_move(SIZES[4], 2, torch.bfloat16, device)
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    dtypes = [(fp16, fp16), (bf16, fp32), (fp32, fp32), (fp32, fp16)]
    # The interpreter truncates float32 to bfloat16 where a card rounds.
    dtypes += [(bf16, bf16), (fp32, bf16)] if not INTERPRETED else []
    for number, sums in enumerate(replica_sums() * 2):  # an odd number: each in two dtypes
        check_sum(sums, SIZES[number % len(SIZES)], dtypes[number % len(dtypes)], device)
        cases += 1
    check_far_apart(device)
    return cases + 3


if __name__ == "__main__":
    print(f"{check_all(CPU)} cases")
