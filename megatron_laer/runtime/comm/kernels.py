"""Triton kernels that copy and sum rows of matrices; `rows` has the torch code of each.

Every result has one writer, so nothing is atomic and bits never depend on timing. A rank's rows
follow from its number as in `sharding.row_bounds`. So kernels need no table of them, even or
uneven. Programs of axis 0 share the elements of one contiguous run of at most ⌈R/N⌉·K; its start is
computed in 64 bits. Numbers that change with layouts are not specialised, nor is the alignment of
their index tensors, so that no kernel is compiled again during training.

Legend: N ranks, G ranks per node, M nodes, D targets. R rows of a matrix, r rows of a rank, P rows
of a local rank on all nodes together, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.blocks import RowBlocks
from megatron_laer.runtime.comm.rows import ReplicaSums

_BLOCK_MOVED = 4096
_BLOCK_SUMMED = 1024


def move_rows(
    whole_CRK: torch.Tensor,
    by_local_rank: torch.Tensor,
    blocks: RowBlocks,
    first: int,
    capacity: int,
    *,
    packs: bool,
) -> None:
    slots, _, columns = whole_CRK.shape
    rows, ranks, node_size = _cut(blocks)
    if whole_CRK.numel():
        _move_rows[(_programs(blocks, columns, _BLOCK_MOVED), ranks, slots)](
            whole_CRK,
            by_local_rank,
            first,
            capacity,
            columns,
            rows,
            ranks,
            node_size,
            PACKS=packs,
            RANKS=triton.next_power_of_2(ranks),
            BLOCK=_BLOCK_MOVED,
        )


def gather_rows(
    arrived: torch.Tensor,
    position_n: torch.Tensor,
    num_fetched: int,
    target_nPK: torch.Tensor,
    blocks: RowBlocks,
    local_rank: int,
) -> None:
    number, _, columns = target_nPK.shape
    if target_nPK.numel():
        _gather_rows[(_programs(blocks, columns, _BLOCK_MOVED), number, blocks.num_nodes)](
            arrived,
            position_n,
            target_nPK,
            num_fetched,
            columns,
            *_cut(blocks),
            local_rank,
            blocks.num_nodes,
            NODES=triton.next_power_of_2(blocks.num_nodes),
            BLOCK=_BLOCK_MOVED,
        )


def sum_replicas(
    parts_nPK: torch.Tensor,
    sums: ReplicaSums,
    out: torch.Tensor,
    blocks: RowBlocks,
    local_rank: int,
    *,
    adds: bool = False,
) -> None:
    columns = parts_nPK.shape[2]
    if out.numel():
        _sum_replicas[
            (_programs(blocks, columns, _BLOCK_SUMMED), sums.num_targets, blocks.num_nodes)
        ](
            parts_nPK,
            sums.uploaded,
            out,
            sums.num_targets,
            columns,
            *_cut(blocks),
            local_rank,
            blocks.num_nodes,
            ADDS=adds,
            NODES=triton.next_power_of_2(blocks.num_nodes),
            BLOCK=_BLOCK_SUMMED,
        )


def _cut(blocks: RowBlocks) -> tuple[int, int, int]:
    return blocks.bounds_N1[-1], len(blocks.bounds_N1) - 1, blocks.node_size


def _programs(blocks: RowBlocks, columns: int, block: int) -> int:
    """Return the programs that a rank's rows need; axis 0 alone may exceed 65535."""
    rows, ranks, _ = _cut(blocks)
    return -(-(-(-rows // ranks) * columns) // block)


@triton.jit
def _rows_of(rank, rows, ranks):
    return (rank + 1) * rows // ranks - rank * rows // ranks


@triton.jit(do_not_specialize=["first", "capacity"])
def _move_rows(
    whole_CRK,
    by_local_rank,
    first,
    capacity,
    columns,
    rows,
    ranks,
    node_size,
    PACKS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one rank's rows of one slot."""
    rank = tl.program_id(1)
    slot = tl.program_id(2).to(tl.int64)
    other = tl.arange(0, RANKS)
    rows_N = tl.where(other < ranks, _rows_of(other, rows, ranks), 0)
    local_N = other % node_size
    local_rank = rank % node_size
    before = tl.sum(tl.where(local_N < local_rank, rows_N, 0), 0)
    together = tl.sum(tl.where(local_N == local_rank, rows_N, 0), 0)
    offset = tl.sum(tl.where((local_N == local_rank) & (other < rank), rows_N, 0), 0)
    whole = slot * rows + rank * rows // ranks
    part = before.to(tl.int64) * capacity + (first + slot) * together + offset
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < _rows_of(rank, rows, ranks) * columns
    in_whole = whole_CRK + whole * columns + at
    in_part = by_local_rank + part * columns + at
    if PACKS:
        tl.store(in_part, tl.load(in_whole, mask=inside), mask=inside)
    else:
        tl.store(in_whole, tl.load(in_part, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=["num_fetched", "local_rank"], do_not_specialize_on_alignment=["position_n"]
)
def _gather_rows(
    arrived,
    position_n,
    target_nPK,
    num_fetched,
    columns,
    rows,
    ranks,
    node_size,
    local_rank,
    nodes,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one expert's rows that come from one node."""
    wanted = tl.program_id(1).to(tl.int64)
    node = tl.program_id(2)
    other = tl.arange(0, NODES)
    rows_M = tl.where(other < nodes, _rows_of(other * node_size + local_rank, rows, ranks), 0)
    size = tl.sum(tl.where(other == node, rows_M, 0), 0)
    offset = tl.sum(tl.where(other < node, rows_M, 0), 0)
    together = tl.sum(rows_M, 0)
    position = tl.load(position_n + wanted)
    fetched = offset.to(tl.int64) * num_fetched + position * size
    source = tl.where(position < num_fetched, fetched, position * together + offset)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * columns
    found = tl.load(arrived + source * columns + at, mask=inside)
    tl.store(target_nPK + (wanted * together + offset) * columns + at, found, mask=inside)


@triton.jit(do_not_specialize=["num_targets", "local_rank"], do_not_specialize_on_alignment=["csr"])
def _sum_replicas(
    parts_nPK,
    csr,
    out,
    num_targets,
    columns,
    rows,
    ranks,
    node_size,
    local_rank,
    nodes,
    ADDS: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the replicas' rows that one node has of one target."""
    target = tl.program_id(1).to(tl.int64)
    node = tl.program_id(2)
    other = tl.arange(0, NODES)
    rows_M = tl.where(other < nodes, _rows_of(other * node_size + local_rank, rows, ranks), 0)
    size = tl.sum(tl.where(other == node, rows_M, 0), 0)
    offset = tl.sum(tl.where(other < node, rows_M, 0), 0).to(tl.int64)
    together = tl.sum(rows_M, 0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * columns
    start = tl.load(csr + target)
    parts = parts_nPK + offset * columns + at
    part = tl.load(csr + start) * together * columns
    total = tl.load(parts + part, mask=inside, other=0.0).to(tl.float32)
    for place in range(start + 1, tl.load(csr + target + 1)):
        part = tl.load(csr + place) * together * columns
        total += tl.load(parts + part, mask=inside, other=0.0).to(tl.float32)
    sums = out + (offset * num_targets + target * size) * columns + at
    if ADDS:
        total = tl.load(sums, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(sums, total.to(out.dtype.element_ty), mask=inside)
