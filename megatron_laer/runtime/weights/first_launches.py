"""First launches of the exchanges' Triton kernels, before training, so that no step compiles one.

Triton compiles a kernel for each dtype, constant, alignment and specialised number that it meets.
Those depend on matrices, groups and settings, and not on layouts. So each kernel is launched here
in all the ways of exchanges, for a single slot.

Legend: R rows of a matrix, r rows of one rank's slice, P rows of one local rank on all nodes
together, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_laer.runtime.comm.blocks import RowBlocks, row_blocks
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.rows import (
    ReplicaSums,
    exchange_kernels,
    gather_rows,
    pack_rows,
    sum_replicas,
    unpack_rows,
)
from megatron_laer.runtime.weights.layer import Carried, Share

# Triton specialises on whether a tensor's address is a multiple of this.
_ALIGNMENT = 16


@torch.no_grad()
def launch_exchange_kernels(
    share: Share,
    num_experts: int,
    groups: FSEPGroups,
    *,
    holds_step: bool,
    wire_dtype: torch.dtype | None,
) -> None:
    """Launch what restores and reduces of a layer launch, by any exchange.

    Args:
        holds_step: whether a step's gradients are summed, in float32.
        wire_dtype: of gradients between nodes, if it is not the weights'.
    """
    if exchange_kernels(share.likes[0]) is None:
        return
    sources = share.sources(num_experts)
    matrices = zip(share.rows, share.columns, share.likes, share.carried, sources, strict=True)
    for at, (rows, columns, like, carried, source) in enumerate(matrices):
        wire = wire_dtype or like.dtype
        grads: set[torch.dtype] = set()
        if at in share.trained_at:
            grads = {like.dtype, torch.float32} if holds_step else {like.dtype}
        homes = () if isinstance(source, torch.Tensor) else source
        for node_size in {groups.size, groups.node_size}:
            blocks = row_blocks(rows, groups.size, node_size)
            node, local_rank = divmod(groups.rank, node_size)
            for form in {carried, *(Carried(rows, columns, dtype) for dtype in grads)}:
                slots_2RK = like.new_empty(2, form.rows, form.columns, dtype=form.dtype)
                # A payload is memory of its own, aligned as any.
                whole = homes if form == carried and form.dtype == like.dtype else ()
                _move(slots_2RK, row_blocks(form.rows, groups.size, node_size), whole)
            if blocks.num_nodes > 1:
                slots_2RK = like.new_empty(2, carried.rows, carried.columns, dtype=carried.dtype)
                _gather(slots_2RK, row_blocks(carried.rows, groups.size, node_size), local_rank)
                for dtype in grads:
                    parts_1PK = like.new_empty(1, blocks.rows_G[local_rank], columns, dtype=dtype)
                    _sum(parts_1PK, [torch.empty_like(parts_1PK, dtype=wire)], blocks, local_rank)
        own_rows = blocks.rows_GM[local_rank][node]
        targets = [like.new_empty(1, own_rows, columns, dtype=dtype) for dtype in {*grads, wire}]
        target = share.grad_target(at, num_experts) if grads else None
        for dtype in {*grads, wire} if grads else ():
            parts_1rK = like.new_empty(1, own_rows, columns, dtype=dtype)
            whole = row_blocks(own_rows, num_ranks=1, node_size=1)
            _sum(parts_1rK, targets, whole, 0)
            if isinstance(target, torch.Tensor):
                _sum(parts_1rK, [_like(target[:1])], whole, 0, adds=True)


def _move(slots_2RK: torch.Tensor, blocks: RowBlocks, homes: Sequence[torch.Tensor]) -> None:
    """Pack and unpack slots, the second of which may be aligned otherwise, as may be a buffer."""
    parts_2 = torch.empty_like(slots_2RK).view(2, -1)
    for slot_RK in (*slots_2RK, *homes):
        for part in parts_2:
            pack_rows(slot_RK[None], part, blocks, 0, 1)
    for slot_RK in slots_2RK:
        unpack_rows(slot_RK[None], parts_2[0], blocks, 0, 1)


def _gather(slots_2PK: torch.Tensor, blocks: RowBlocks, local_rank: int) -> None:
    slots_2PK = slots_2PK[:, : blocks.rows_G[local_rank]].contiguous()
    position_1 = torch.zeros(1, dtype=torch.int64, device=slots_2PK.device)
    for slot_PK in slots_2PK:
        arrived = torch.empty_like(slot_PK).view(-1)
        gather_rows(arrived, position_1, 1, 0, slot_PK[None], blocks, local_rank)


def _sum(
    parts_1PK: torch.Tensor,
    targets: Sequence[torch.Tensor],
    blocks: RowBlocks,
    local_rank: int,
    *,
    adds: bool = False,
) -> None:
    csr = np.array([2, 3, 0])  # the sum of part 0
    sums = ReplicaSums(1, csr, *upload_arrays([csr], parts_1PK.device))
    for target in targets:
        sum_replicas(parts_1PK, sums, target, blocks, local_rank, adds=adds)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor of the same shape and alignment."""
    offset = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
    return tensor.new_empty(offset + tensor.numel())[offset:].view(tensor.shape)
