"""A `MatrixReduce` sums the gradients of one matrix's replicas into the slices of their experts.

Legend: N ranks, E experts, C slots per rank; G ranks per node, M = N/G nodes, D distinct experts of
a node, n slots of a node; R rows of a matrix, r rows of the slice that one rank holds, P rows that
one local rank holds on all nodes together, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_laer.runtime.comm.reduce_index import ReduceIndex
from megatron_laer.runtime.comm.row_blocks import RowBlocks, row_blocks
from megatron_laer.runtime.comm.rows import pack_rows, sum_replicas
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

    def run(self, grad_CRK: torch.Tensor, out_ErK: torch.Tensor, *, adds: bool) -> None:
        """Reduce the gradients of this rank's slots, and all others', into or onto `out_ErK`."""
        parts, sums = grad_CRK, self.index.intra_node
        if self.stages.intra_node is not None:
            parts = self._collect(self.stages.intra_node, grad_CRK)
        if self.stages.inter_node is not None:
            parts = self._sum_and_send(self.stages.inter_node, parts)
            assert self.index.inter_node is not None, "an index for one node"
            sums = self.index.inter_node
        own_rows = row_blocks(out_ErK.shape[1], num_ranks=1, node_size=1)
        sum_replicas(parts, sums, out_ErK, own_rows, 0, adds=adds)

    def _collect(self, stage: Stage, grad_CRK: torch.Tensor) -> torch.Tensor:
        """Collect this local rank's rows of the gradients of all slots of the node: [n, P, K]."""
        capacity, _, columns = grad_CRK.shape
        rows_G, node_size = self.blocks.rows_G, self.blocks.node_size
        own_rows = rows_G[self.local_rank]
        send = self.buffers.take("send", (grad_CRK.numel(),), grad_CRK.dtype)
        pack_rows(grad_CRK, send, self.blocks, 0, capacity)
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
        sum_replicas(parts_nPK, self.index.intra_node, send, self.blocks, self.local_rank)
        sent_sizes = [distinct * size * columns for size in rows_M]
        received = self.buffers.take(
            "receive", (sum(distinct_M), own_rows, columns), self.wire_dtype
        )
        sizes = [number * own_rows * columns for number in distinct_M]
        self.count.add_reduce(*stage.all_to_all(received.view(-1), send, sizes, sent_sizes))
        return received
