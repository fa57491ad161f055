"""A `MatrixRestore` fetches the rows of one matrix's experts and lays out whole experts in slots.

Legend: N ranks, E experts, C slots per rank; G ranks per node, M = N/G nodes, D distinct experts
that arrive at a node, n slots of a node to restore; R rows of a matrix, r rows of the slice that
one rank holds, P rows that one local rank holds on all nodes together, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_laer.runtime.comm.restore_index import RestoreIndex
from megatron_laer.runtime.comm.row_blocks import RowBlocks
from megatron_laer.runtime.comm.rows import gather_rows, pack_rows, unpack_rows
from megatron_laer.runtime.comm.stages import ExchangeCount, Stage, Stages
from megatron_laer.runtime.comm.workspace import MatrixBuffers


@dataclass(frozen=True)
class MatrixRestore:
    """Runs one restore of one matrix on this rank.

    Attributes:
        node, local_rank: where this rank is.
        count: is told what each collective received.
    """

    node: int
    local_rank: int
    stages: Stages
    index: RestoreIndex
    blocks: RowBlocks
    buffers: MatrixBuffers
    count: ExchangeCount

    def run(self, slice_ErK: torch.Tensor, out_CRK: torch.Tensor) -> None:
        """Restore the slots of the index into `out_CRK`, whose other slots are right already."""
        # Without an inter-node stage, the ranks of the node hold all rows of every expert.
        arrived = slice_ErK
        if self.stages.inter_node is not None:
            arrived = self._fetch(self.stages.inter_node, slice_ErK, out_CRK)
        if self.stages.intra_node is not None:
            self._spread(self.stages.intra_node, arrived, out_CRK)
        else:
            for first, slots in self.index.runs:
                self._gather(arrived, first, out_CRK[slots])

    def _fetch(
        self, stage: Stage, slice_ErK: torch.Tensor, before_CRK: torch.Tensor
    ) -> torch.Tensor:
        """Fetch this local rank's rows of the experts that the node needs.

        Returns:
            Flat: experts fetched, [D, r, K] node by node, then those that ranks of this node
            shared, [D, P, K].
        """
        index, rows_M = self.index, self.blocks.rows_GM[self.local_rank]
        _, own_rows, columns = slice_ErK.shape
        num_fetched, num_shared = index.fetched_M[self.node], sum(index.shared_G)
        expert_size = sum(rows_M) * columns
        arrived = self.buffers.take(
            "receive", ((num_fetched + num_shared) * expert_size,), slice_ErK.dtype
        )
        fetched, shared = arrived.split([num_fetched * expert_size, num_shared * expert_size])
        if sum(index.fetched_M):  # known to every rank
            shape = (sum(index.fetched_M), own_rows, columns)
            send = self.buffers.take("send", shape, slice_ErK.dtype)
            torch.index_select(slice_ErK, 0, index.sent_experts, out=send)
            sizes = [num_fetched * rows * columns for rows in rows_M]
            sent_sizes = [number * own_rows * columns for number in index.fetched_M]
            self.count.add_restore(*stage.all_to_all(fetched, send.view(-1), sizes, sent_sizes))
        if num_shared:
            self._share(before_CRK, shared)
        return arrived

    def _share(self, before_CRK: torch.Tensor, received: torch.Tensor) -> None:
        """Exchange, inside the node, rows of experts that its ranks have whole from before."""
        stage, slots = self.stages.intra_node, self.index.shared_slots
        _, rows, columns = before_CRK.shape
        send = received
        if stage is not None:
            send = self.buffers.take("send", (len(slots) * rows * columns,), before_CRK.dtype)
        for position, slot in enumerate(slots):
            whole_1RK = before_CRK[slot : slot + 1]
            pack_rows(whole_1RK, send, self.blocks, position, len(slots))
        if stage is None:
            return
        rows_G = self.blocks.rows_G
        sizes = [number * rows_G[self.local_rank] * columns for number in self.index.shared_G]
        sent_sizes = [len(slots) * rows * columns for rows in rows_G]
        self.count.add_restore(*stage.all_to_all(received, send, sizes, sent_sizes))

    def _spread(self, stage: Stage, arrived: torch.Tensor, out_CRK: torch.Tensor) -> None:
        """Send this local rank's rows to the slots of the node; receive whole experts for mine."""
        restored_G, rows_G = self.index.restored_G, self.blocks.rows_G
        total, num_restored = sum(restored_G), restored_G[self.local_rank]
        if total == 0:  # known to every rank of the node
            return
        own_rows, columns = rows_G[self.local_rank], out_CRK.shape[2]
        send = self.buffers.take("send", (total, own_rows, columns), out_CRK.dtype)
        self._gather(arrived, 0, send)
        sizes = [num_restored * rows * columns for rows in rows_G]
        received = self.buffers.take("receive", (sum(sizes),), out_CRK.dtype)
        sent_sizes = [number * own_rows * columns for number in restored_G]
        self.count.add_restore(*stage.all_to_all(received, send.view(-1), sizes, sent_sizes))
        for first, slots in self.index.runs:
            unpack_rows(out_CRK[slots], received, self.blocks, first, num_restored)

    def _gather(self, arrived: torch.Tensor, first: int, target_nPK: torch.Tensor) -> None:
        """Gather this local rank's rows of the experts of some of the node's slots to restore.

        Args:
            arrived: what `_fetch` returned; with one node, the slices of all experts.
            first: which of the slots to restore is the first of the target's.
        """
        index = self.index
        position_n = index.position_n[first : first + len(target_nPK)]
        if self.blocks.num_nodes == 1:
            torch.index_select(arrived, 0, position_n, out=target_nPK)
            return
        num_fetched, num_shared = index.fetched_M[self.node], sum(index.shared_G)
        gather_rows(
            arrived, position_n, num_fetched, num_shared, target_nPK, self.blocks, self.local_rank
        )
