"""A `MatrixReduce` sums the gradients of one matrix's replicas into the slices of their experts.

Legend: N ranks, E experts, C slots per rank; G ranks per node, M = N/G nodes, D distinct experts of
a node, n slots of a node; R rows of a matrix, r rows of the slice that one rank holds, P rows that
one local rank holds on all nodes together, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_laer.runtime.comm.reduce_index import ReduceIndex, Rounds
from megatron_laer.runtime.comm.row_blocks import RowBlocks
from megatron_laer.runtime.comm.stages import ExchangeCount, Stage, Stages
from megatron_laer.runtime.comm.workspace import MatrixBuffers


@dataclass(frozen=True)
class MatrixReduce:
    """Runs one reduce of one matrix on this rank.

    Attributes:
        node, local_rank: where this rank is.
        wire_dtype: of sums that cross nodes.
        count: is told what each collective received.
    """

    node: int
    local_rank: int
    stages: Stages
    index: ReduceIndex
    blocks: RowBlocks
    buffers: MatrixBuffers
    wire_dtype: torch.dtype
    count: ExchangeCount

    def run(self, grad_CRK: torch.Tensor, out_ErK: torch.Tensor) -> None:
        """Reduce the gradients of this rank's slots, and all others', into `out_ErK`."""
        parts, rounds = grad_CRK, self.index.intra_node
        if self.stages.intra_node is not None:
            parts = self._collect(self.stages.intra_node, grad_CRK)
        if self.stages.inter_node is not None:
            parts = self._sum_and_send(self.stages.inter_node, parts)
            rounds = self.index.inter_node
        _sum(parts, rounds, out_ErK, self.buffers)

    def _collect(self, stage: Stage, grad_CRK: torch.Tensor) -> torch.Tensor:
        """Collect this local rank's rows of the gradients of all slots of the node: [n, P, K]."""
        capacity, _, columns = grad_CRK.shape
        rows_G, node_size = self.blocks.rows_G, self.blocks.node_size
        own_rows = rows_G[self.local_rank]
        send = self.buffers.take("send", (grad_CRK.numel(),), grad_CRK.dtype)
        for whole, part in self.blocks.pairs(grad_CRK, send, 0, capacity):
            part.copy_(whole)
        shape = (node_size * capacity, own_rows, columns)
        received = self.buffers.take("receive", shape, grad_CRK.dtype)
        sizes = [capacity * own_rows * columns] * node_size
        sent_sizes = [capacity * rows * columns for rows in rows_G]
        self.count.add_reduce(*stage.all_to_all(received.view(-1), send, sizes, sent_sizes))
        return received

    def _sum_and_send(self, stage: Stage, parts_nPK: torch.Tensor) -> torch.Tensor:
        """Sum the node's replicas and send the sums; return this rank's rows of all nodes' sums.

        Returns:
            [D, r, K] node by node.
        """
        _, rows, columns = parts_nPK.shape
        distinct_M, rows_M = self.index.distinct_M, self.blocks.rows_GM[self.local_rank]
        distinct, own_rows = distinct_M[self.node], rows_M[self.node]
        send = self.buffers.take("send", (distinct * rows * columns,), self.wire_dtype)
        sent_sizes = [distinct * size * columns for size in rows_M]
        offset = 0
        for size, part in zip(rows_M, send.split(sent_sizes), strict=True):
            rows_of_node = parts_nPK[:, offset : offset + size]
            sums_DrK = part.view(distinct, size, columns)
            _sum(rows_of_node, self.index.intra_node, sums_DrK, self.buffers)
            offset += size
        received = self.buffers.take(
            "receive", (sum(distinct_M), own_rows, columns), self.wire_dtype
        )
        sizes = [number * own_rows * columns for number in distinct_M]
        self.count.add_reduce(*stage.all_to_all(received.view(-1), send, sizes, sent_sizes))
        return received


def _sum(
    parts: torch.Tensor, rounds: Rounds, target_DrK: torch.Tensor, buffers: MatrixBuffers
) -> None:
    """Sum parts [n, r, K] into their targets in float32, round by round."""
    (_, first), *others = rounds
    if not others and parts.dtype == target_DrK.dtype:
        torch.index_select(parts, 0, first, out=target_DrK)
        return

    def widened(sources: torch.Tensor) -> torch.Tensor:
        shape = (len(sources), *parts.shape[1:])
        picked = buffers.take("picked", shape, parts.dtype)
        torch.index_select(parts, 0, sources, out=picked)
        if parts.dtype == torch.float32:
            return picked
        return buffers.take("widened", shape, torch.float32).copy_(picked)

    total = target_DrK
    if target_DrK.dtype != torch.float32:
        total = buffers.take("total", tuple(target_DrK.shape), torch.float32)
    if parts.dtype == torch.float32:
        torch.index_select(parts, 0, first, out=total)
    else:
        total.copy_(widened(first))
    for targets, sources in others:
        total.index_add_(0, targets, widened(sources))
    if total is not target_DrK:
        target_DrK.copy_(total)
