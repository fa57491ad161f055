"""Reduces of one matrix: the sums over replicas that a rank computes, and their data path.

`reduce_matrix` sums the gradients of a matrix's replicas into the slices of their experts.

Legend: N ranks, E experts, C replica slots per rank, S those of all ranks, G ranks per node, M =
N/G nodes. D distinct experts of a node, n filled slots of a node. R rows of a matrix, r rows of one
rank's slice, P rows of one local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.placed import Placed, node_sources
from megatron_laer.runtime.comm.blocks import row_blocks
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.process_groups import Group
from megatron_laer.runtime.comm.restore import Run, runs_of
from megatron_laer.runtime.comm.rows import ReplicaSums, pack_rows, sum_replicas
from megatron_laer.runtime.comm.stages import DataPath, Stage


@dataclass(frozen=True, eq=False)
class ReduceIndex:
    """Sums of the gradients of a layout's slots, as one rank computes them.

    Attributes:
        experts: experts that are summed: all, or those with replicas where they have homes.
        filled_G: replica slots with an expert on each rank of this node.
        runs: this rank's slots with an expert.
        distinct_M: distinct experts of each node; empty with one node.
        intra_node: sums the node's slots, in slot order, into its D distinct experts; into all
            `experts` with one node.
        inter_node: sums the nodes' sums, `distinct_M` each, into all E experts, in node order; None
            with one node. It shares device memory with `intra_node`.
    """

    experts: Int64
    filled_G: list[int]
    runs: list[Run]
    distinct_M: list[int]
    intra_node: ReplicaSums
    inter_node: ReplicaSums | None


def reduce_index(placed: Placed, node_size: int, rank: int, device: torch.device) -> ReduceIndex:
    geometry, expert_S = placed.geometry, placed.replica_expert_S.astype(np.int64)
    node, local_rank = divmod(rank, node_size)
    slots_of_node = slice(*(np.array([node, node + 1]) * node_size * geometry.replica_slots))
    filled_GC = placed.filled_S[slots_of_node].reshape(node_size, -1)
    summed = np.arange(geometry.num_experts)
    if geometry.sharding == Sharding.EXPERTS:
        summed = np.unique(expert_S[placed.filled_S])
    of_rank = {
        "experts": summed,
        "filled_G": filled_GC.sum(axis=1).tolist(),
        "runs": runs_of(np.flatnonzero(filled_GC[local_rank])),
    }
    # Parts of a sum are the node's filled slots, or a single rank's slots as they are.
    part_n = np.arange(filled_GC.sum()) if node_size > 1 else np.flatnonzero(filled_GC[0])
    expert_n = expert_S[slots_of_node][filled_GC.ravel()]
    if geometry.num_ranks == node_size:
        (sums,) = _replica_sums([(np.searchsorted(summed, expert_n), part_n)], device)
        return ReduceIndex(**of_rank, distinct_M=[], intra_node=sums, inter_node=None)
    node_of_pair, experts = np.divmod(
        node_sources(placed, node_size, placed.filled_S).fetched_pairs, geometry.num_experts
    )
    of_node = np.searchsorted(experts[node_of_pair == node], expert_n)
    of_pair = np.searchsorted(summed, experts)
    intra_node, inter_node = _replica_sums(
        [(of_node, part_n), (of_pair, np.arange(len(of_pair)))], device
    )
    return ReduceIndex(
        **of_rank,
        distinct_M=np.bincount(node_of_pair, minlength=geometry.num_ranks // node_size).tolist(),
        intra_node=intra_node,
        inter_node=inter_node,
    )


def _replica_sums(
    targets_and_parts: Sequence[tuple[Int64, Int64]], device: torch.device
) -> list[ReplicaSums]:
    arrays = [_csr(target_n, part_n) for target_n, part_n in targets_and_parts]
    return [
        ReplicaSums(int(csr[0]) - 1, csr, uploaded)
        for csr, uploaded in zip(arrays, upload_arrays(arrays, device), strict=True)
    ]


def _csr(target_n: Int64, part_n: Int64) -> Int64:
    ends = np.cumsum(np.bincount(target_n))
    first = len(ends) + 1
    parts = part_n[np.argsort(target_n, kind="stable")]
    return np.concatenate(([first], first + ends, parts))


def reduce_matrix(
    index: ReduceIndex,
    path: DataPath,
    grad_CRK: torch.Tensor,
    out_ErK: torch.Tensor,
    wire_dtype: torch.dtype,
    *,
    adds: bool,
) -> Generator[Group | None]:
    """Reduce all ranks' gradients into or onto `out_ErK`; sums cross nodes in `wire_dtype`."""
    parts, sums = grad_CRK, index.intra_node
    if path.stages.intra_node is not None:
        parts = yield from _collect(index, path, path.stages.intra_node, grad_CRK)
    if path.stages.inter_node is not None:
        parts = yield from _sum_and_send(index, path, path.stages.inter_node, parts, wire_dtype)
        assert index.inter_node is not None, "an index for one node"
        sums = index.inter_node
    own_rows = row_blocks(out_ErK.shape[1], num_ranks=1, node_size=1)
    sum_replicas(parts, sums, out_ErK, own_rows, 0, adds=adds)


def _collect(
    index: ReduceIndex, path: DataPath, stage: Stage, grad_CRK: torch.Tensor
) -> Generator[Group | None, None, torch.Tensor]:
    """Collect this local rank's rows of the gradients of the node's filled slots: [n, P, K]."""
    _, rows, columns = grad_CRK.shape
    rows_G, filled_G = path.blocks.rows_G, index.filled_G
    own_rows, filled = rows_G[path.local_rank], filled_G[path.local_rank]
    send = path.buffers.take("send", (filled * rows * columns,), grad_CRK.dtype)
    for first, slots in index.runs:
        pack_rows(grad_CRK[slots], send, path.blocks, first, filled)
    shape = (sum(filled_G), own_rows, columns)
    received = path.buffers.take("receive", shape, grad_CRK.dtype)
    sizes = [number * own_rows * columns for number in filled_G]
    sent_sizes = [filled * part * columns for part in rows_G]
    more = path.stages.inter_node is not None
    sending = stage.all_to_all(received.view(-1), send, sizes, sent_sizes, more=more)
    path.count(*(yield from sending))
    return received


def _sum_and_send(
    index: ReduceIndex,
    path: DataPath,
    stage: Stage,
    parts_nPK: torch.Tensor,
    wire_dtype: torch.dtype,
) -> Generator[Group | None, None, torch.Tensor]:
    """Sum the node's replicas and exchange the sums: this rank's rows, [D, r, K] node by node."""
    _, rows, columns = parts_nPK.shape
    distinct_M, rows_M = index.distinct_M, path.blocks.rows_GM[path.local_rank]
    distinct, own_rows = distinct_M[path.node], rows_M[path.node]
    send = path.buffers.take("send", (distinct * rows * columns,), wire_dtype)
    sum_replicas(parts_nPK, index.intra_node, send, path.blocks, path.local_rank)
    sent_sizes = [distinct * size * columns for size in rows_M]
    received = path.buffers.take("receive", (sum(distinct_M), own_rows, columns), wire_dtype)
    sizes = [number * own_rows * columns for number in distinct_M]
    path.count(*(yield from stage.all_to_all(received.view(-1), send, sizes, sent_sizes)))
    return received
