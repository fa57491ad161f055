"""Reduces of one matrix: the sums over replicas that a rank computes, and their data path.

`reduce_matrix` sums the gradients of a matrix's replicas into the slices of their experts.

Legend: N ranks, E experts, C slots per rank, S slots of all ranks, G ranks per node, M = N/G nodes.
D distinct experts of a node, n slots of a node. R rows of a matrix, r rows of one rank's slice, P
rows of one local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.sharding import node_sources
from megatron_laer.runtime.comm.blocks import row_blocks
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.rows import ReplicaSums, pack_rows, sum_replicas
from megatron_laer.runtime.comm.stages import DataPath, Stage


@dataclass(frozen=True, eq=False)
class ReduceIndex:
    """Sums of the gradients of a layout's slots, as one rank computes them.

    Attributes:
        distinct_M: distinct experts of each node; empty with one node.
        intra_node: sums the node's slots, in slot order, into its D distinct experts; into all E
            experts with one node.
        inter_node: sums the nodes' sums, `distinct_M` each, into all E experts, in node order; None
            with one node. It shares device memory with `intra_node`.
    """

    distinct_M: list[int]
    intra_node: ReplicaSums
    inter_node: ReplicaSums | None


def reduce_index(
    layout: ExpertLayout, node_size: int, rank: int, device: torch.device
) -> ReduceIndex:
    expert_S = layout.slot_expert_S.astype(np.int64)
    if layout.num_ranks == node_size:
        (sums,) = _replica_sums([expert_S], device)
        return ReduceIndex([], sums, None)
    node = rank // node_size
    all_S = np.ones(layout.num_slots, dtype=np.bool_)
    node_of_pair, experts = np.divmod(
        node_sources(layout, node_size, all_S).fetched_pairs, layout.num_experts
    )
    slots = node_size * layout.capacity
    expert_of_node_slot = expert_S[node * slots : (node + 1) * slots]
    of_node = np.searchsorted(experts[node_of_pair == node], expert_of_node_slot)
    intra_node, inter_node = _replica_sums([of_node, experts], device)
    return ReduceIndex(
        distinct_M=np.bincount(node_of_pair, minlength=layout.num_ranks // node_size).tolist(),
        intra_node=intra_node,
        inter_node=inter_node,
    )


def _replica_sums(targets: Sequence[Int64], device: torch.device) -> list[ReplicaSums]:
    arrays = [_csr(target_of_part) for target_of_part in targets]
    return [
        ReplicaSums(int(csr[0]) - 1, csr, uploaded)
        for csr, uploaded in zip(arrays, upload_arrays(arrays, device), strict=True)
    ]


def _csr(target_of_part: Int64) -> Int64:
    ends = np.cumsum(np.bincount(target_of_part))
    first = len(ends) + 1
    parts = np.argsort(target_of_part, kind="stable")
    return np.concatenate(([first], first + ends, parts))


def reduce_matrix(
    index: ReduceIndex,
    path: DataPath,
    grad_CRK: torch.Tensor,
    out_ErK: torch.Tensor,
    wire_dtype: torch.dtype,
    *,
    adds: bool,
) -> None:
    """Reduce all ranks' gradients into or onto `out_ErK`; sums cross nodes in `wire_dtype`."""
    parts, sums = grad_CRK, index.intra_node
    if path.stages.intra_node is not None:
        parts = _collect(path, path.stages.intra_node, grad_CRK)
    if path.stages.inter_node is not None:
        parts = _sum_and_send(index, path, path.stages.inter_node, parts, wire_dtype)
        assert index.inter_node is not None, "an index for one node"
        sums = index.inter_node
    own_rows = row_blocks(out_ErK.shape[1], num_ranks=1, node_size=1)
    sum_replicas(parts, sums, out_ErK, own_rows, 0, adds=adds)


def _collect(path: DataPath, stage: Stage, grad_CRK: torch.Tensor) -> torch.Tensor:
    """Collect this local rank's rows of the gradients of all slots of the node: [n, P, K]."""
    capacity, _, columns = grad_CRK.shape
    rows_G, node_size = path.blocks.rows_G, path.blocks.node_size
    own_rows = rows_G[path.local_rank]
    send = path.buffers.take("send", (grad_CRK.numel(),), grad_CRK.dtype)
    pack_rows(grad_CRK, send, path.blocks, 0, capacity)
    shape = (node_size * capacity, own_rows, columns)
    received = path.buffers.take("receive", shape, grad_CRK.dtype)
    sizes = [capacity * own_rows * columns] * node_size
    sent_sizes = [capacity * rows * columns for rows in rows_G]
    path.count(*stage.all_to_all(received.view(-1), send, sizes, sent_sizes))
    return received


def _sum_and_send(
    index: ReduceIndex,
    path: DataPath,
    stage: Stage,
    parts_nPK: torch.Tensor,
    wire_dtype: torch.dtype,
) -> torch.Tensor:
    """Sum the node's replicas and exchange the sums: this rank's rows, [D, r, K] node by node."""
    _, rows, columns = parts_nPK.shape
    distinct_M, rows_M = index.distinct_M, path.blocks.rows_GM[path.local_rank]
    distinct, own_rows = distinct_M[path.node], rows_M[path.node]
    send = path.buffers.take("send", (distinct * rows * columns,), wire_dtype)
    sum_replicas(parts_nPK, index.intra_node, send, path.blocks, path.local_rank)
    sent_sizes = [distinct * size * columns for size in rows_M]
    received = path.buffers.take("receive", (sum(distinct_M), own_rows, columns), wire_dtype)
    sizes = [number * own_rows * columns for number in distinct_M]
    path.count(*stage.all_to_all(received.view(-1), send, sizes, sent_sizes))
    return received
