"""Restores of one matrix: the rows that a rank sends, receives and copies, and their data path.

Every rank knows both layouts and computes its own `RestoreIndex`, consistent with the others'.
`restore_matrix` fetches rows of experts and lays out whole experts in slots.

Worked example, on 4 ranks, 2 nodes, 2 slots per rank. Two slots change, both on node 0:

    rank (node)   0 (0)    1 (0)    2 (1)    3 (1)
    before        0 1      0 2      3 0      3 2
    after         3 1      1 2      3 0      3 2

Node 0 needs experts 3 and 1. None of its slots had 3, so its ranks fetch rows of 3 from the other
node. Slot 1 of rank 0 had 1, so rank 0 shares it with its node. On rank 0:

    sent_experts [3]              expert 3 goes to node 0 ...
    fetched_M    [1, 0]           ... that is one expert to node 0, none to node 1
    shared_slots [1]              its slot 1 has an expert that the node needs
    shared_G     [1, 0]           rank 0 of the node shares one expert, rank 1 none
    position_n   [0, 1]           expert 3 arrives first (fetched), 1 after it (shared)
    restored_G   [1, 1]           each rank of the node has one slot to restore
    runs         [(0, slot 0)]    the first of rank 0's slots to restore is slot 0

Legend: N ranks, E experts, C slots per rank, S = N·C slots, G ranks per node, M = N/G nodes. n
slots of a node to restore, D distinct experts that arrive at a node for them. R rows of a matrix, r
rows of one rank's slice, P rows of one local rank on all nodes together, K columns.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.placed import Placed, node_sources
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.process_groups import Group
from megatron_laer.runtime.comm.rows import gather_rows, pack_rows, unpack_rows
from megatron_laer.runtime.comm.stages import DataPath, Stage


class Run(NamedTuple):
    """Neighbouring slots of this rank to restore, and the number of such slots before them."""

    first: int
    slots: slice


@dataclass(frozen=True, eq=False)
class RestoreIndex:
    """Rows that one rank sends, receives and copies to restore the changed slots of a layout.

    Attributes:
        has_work: whether any rank of the group has a slot to restore.
        experts: experts whose rows ranks have for this restore: all, or those that homes spread.
        sent_experts: positions, among `experts`, of those that node 0, node 1, … fetch, by way of
            their ranks of this local rank.
        fetched_M: number of experts that each node fetches.
        shared_slots: this rank's slots whose experts, restored before, it shares with its node.
        shared_G: number of experts that each rank of this node shares.
        position_n: for each slot to restore on this node, by rank, its expert's position among the
            D that arrive: fetched ones first, then shared ones. With one node, among `experts`.
        restored_G: slots to restore on each rank of this node.
        runs: this rank's slots to restore.
    """

    has_work: bool
    experts: Int64
    sent_experts: torch.Tensor
    fetched_M: list[int]
    shared_slots: list[int]
    shared_G: list[int]
    position_n: torch.Tensor
    restored_G: list[int]
    runs: list[Run]


def restore_index(
    before: Placed | None,
    after: Placed,
    node_size: int,
    rank: int,
    device: torch.device,
) -> RestoreIndex:
    """Index the slots of `after` whose expert differs from `before`; all slots if that is None."""
    num_ranks, num_experts = after.geometry.num_ranks, after.geometry.num_experts
    node, local_rank = divmod(rank, node_size)
    changed_S = after.changed_S(before)
    ranks_of_node = slice(node * node_size, (node + 1) * node_size)
    changed_GC = changed_S.reshape(num_ranks, -1)[ranks_of_node]
    expert_GC = after.replica_expert_S.astype(np.int64).reshape(num_ranks, -1)[ranks_of_node]

    experts = np.arange(num_experts)
    if after.geometry.sharding == Sharding.EXPERTS:
        experts = np.unique(after.replica_expert_S[changed_S]).astype(np.int64)
    arrivals = _arrivals(before, after, changed_S, node_size, rank, experts)
    position_n = arrivals.positions(expert_GC[changed_GC], num_experts)
    sent_positions = np.searchsorted(experts, arrivals.sent_experts)
    sent_experts, positions = upload_arrays([sent_positions, position_n], device)
    return RestoreIndex(
        has_work=bool(changed_S.any()),
        experts=experts,
        sent_experts=sent_experts,
        fetched_M=arrivals.fetched_M,
        shared_slots=arrivals.shared_slots,
        shared_G=arrivals.shared_G,
        position_n=positions,
        restored_G=changed_GC.sum(axis=1).tolist(),
        runs=runs_of(np.flatnonzero(changed_GC[local_rank])),
    )


@dataclass(frozen=True, eq=False)
class _Arrivals:
    """Routes of experts to nodes; `expert_D` arrive at this rank's node, fetched ones first."""

    sent_experts: Int64
    fetched_M: list[int]
    shared_slots: list[int]
    shared_G: list[int]
    expert_D: Int64

    def positions(self, expert_n: Int64, num_experts: int) -> Int64:
        position_E = np.full(num_experts, -1)
        position_E[self.expert_D] = np.arange(len(self.expert_D))
        return position_E[expert_n]


def _arrivals(
    before: Placed | None,
    after: Placed,
    changed_S: Bool,
    node_size: int,
    rank: int,
    held: Int64,
) -> _Arrivals:
    """Separate fetched experts from shared ones, in the order in which they arrive."""
    num_experts, capacity = after.geometry.num_experts, after.geometry.replica_slots
    num_nodes, node = after.geometry.num_ranks // node_size, rank // node_size
    if num_nodes == 1:  # the node's ranks hold all rows of every expert
        nothing = np.empty(0, np.int64)
        return _Arrivals(nothing, [0], [], [0] * node_size, held)

    sources = node_sources(after, node_size, changed_S, before)
    to_node, sent_experts = np.divmod(sources.fetched_pairs, num_experts)

    # Shared experts arrive rank by rank, and per rank in the order of its slots.
    in_order = np.argsort(sources.shared_slots)
    slots = sources.shared_slots[in_order]
    experts = sources.shared_pairs[in_order] % num_experts
    rank_of_slot = slots // capacity
    is_of_node = rank_of_slot // node_size == node
    local_ranks = rank_of_slot[is_of_node] - node * node_size
    return _Arrivals(
        sent_experts=sent_experts,
        fetched_M=np.bincount(to_node, minlength=num_nodes).tolist(),
        shared_slots=(slots[rank_of_slot == rank] % capacity).tolist(),
        shared_G=np.bincount(local_ranks, minlength=node_size).tolist(),
        expert_D=np.concatenate([sent_experts[to_node == node], experts[is_of_node]]),
    )


def runs_of(slots: Int64) -> list[Run]:
    runs, first = [], 0
    for run in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
        if len(run):
            runs.append(Run(first, slice(int(run[0]), int(run[-1]) + 1)))
        first += len(run)
    return runs


def restore_matrix(
    index: RestoreIndex, path: DataPath, slice_ErK: torch.Tensor, out_CRK: torch.Tensor
) -> Generator[Group | None]:
    """Restore the slots of the index into `out_CRK`, whose other slots are already right."""
    # Without an inter-node stage, the ranks of the node hold all rows of every expert.
    arrived = slice_ErK
    if path.stages.inter_node is not None:
        arrived = yield from _fetch(index, path, path.stages.inter_node, slice_ErK, out_CRK)
    if path.stages.intra_node is not None:
        yield from _spread(index, path, path.stages.intra_node, arrived, out_CRK)
    else:
        for first, slots in index.runs:
            _gather(index, path, arrived, first, out_CRK[slots])


def _fetch(
    index: RestoreIndex,
    path: DataPath,
    stage: Stage,
    slice_ErK: torch.Tensor,
    before_CRK: torch.Tensor,
) -> Generator[Group | None, None, torch.Tensor]:
    """Fetch this local rank's rows of the experts that the node needs, flat.

    They are [D, r, K] node by node, then those shared by this node, [D, P, K].
    """
    rows_M = path.blocks.rows_GM[path.local_rank]
    _, own_rows, columns = slice_ErK.shape
    num_fetched, num_shared = index.fetched_M[path.node], sum(index.shared_G)
    expert_size = sum(rows_M) * columns
    arrived = path.buffers.take(
        "receive", ((num_fetched + num_shared) * expert_size,), slice_ErK.dtype
    )
    fetched, shared = arrived.split([num_fetched * expert_size, num_shared * expert_size])
    if sum(index.fetched_M):  # known to every rank
        shape = (sum(index.fetched_M), own_rows, columns)
        send = path.buffers.take("send", shape, slice_ErK.dtype)
        torch.index_select(slice_ErK, 0, index.sent_experts, out=send)
        sizes = [num_fetched * rows * columns for rows in rows_M]
        sent_sizes = [number * own_rows * columns for number in index.fetched_M]
        more = path.stages.intra_node is not None
        sending = stage.all_to_all(fetched, send.view(-1), sizes, sent_sizes, more=more)
        path.count(*(yield from sending))
    if num_shared:
        yield from _share(index, path, before_CRK, shared)
    return arrived


def _share(
    index: RestoreIndex, path: DataPath, before_CRK: torch.Tensor, received: torch.Tensor
) -> Generator[Group | None]:
    """Exchange, inside the node, rows of experts that its ranks hold from before."""
    stage, slots = path.stages.intra_node, index.shared_slots
    _, rows, columns = before_CRK.shape
    send = received
    if stage is not None:
        send = path.buffers.take("send", (len(slots) * rows * columns,), before_CRK.dtype)
    for position, slot in enumerate(slots):
        whole_1RK = before_CRK[slot : slot + 1]
        pack_rows(whole_1RK, send, path.blocks, position, len(slots))
    if stage is None:
        return
    rows_G = path.blocks.rows_G
    sizes = [number * rows_G[path.local_rank] * columns for number in index.shared_G]
    sent_sizes = [len(slots) * rows * columns for rows in rows_G]
    path.count(*(yield from stage.all_to_all(received, send, sizes, sent_sizes, more=True)))


def _spread(
    index: RestoreIndex, path: DataPath, stage: Stage, arrived: torch.Tensor, out_CRK: torch.Tensor
) -> Generator[Group | None]:
    """Send this local rank's rows to the slots of the node, and receive its own whole experts."""
    restored_G, rows_G = index.restored_G, path.blocks.rows_G
    total, num_restored = sum(restored_G), restored_G[path.local_rank]
    if total == 0:  # known to every rank of the node
        return
    own_rows, columns = rows_G[path.local_rank], out_CRK.shape[2]
    send = path.buffers.take("send", (total, own_rows, columns), out_CRK.dtype)
    _gather(index, path, arrived, 0, send)
    sizes = [num_restored * rows * columns for rows in rows_G]
    received = path.buffers.take("receive", (sum(sizes),), out_CRK.dtype)
    sent_sizes = [number * own_rows * columns for number in restored_G]
    path.count(*(yield from stage.all_to_all(received, send.view(-1), sizes, sent_sizes)))
    for first, slots in index.runs:
        unpack_rows(out_CRK[slots], received, path.blocks, first, num_restored)


def _gather(
    index: RestoreIndex,
    path: DataPath,
    arrived: torch.Tensor,
    first: int,
    target_nPK: torch.Tensor,
) -> None:
    """Gather this local rank's rows for the target's slots, `first` and following."""
    position_n = index.position_n[first : first + len(target_nPK)]
    if path.blocks.num_nodes == 1:
        torch.index_select(arrived, 0, position_n, out=target_nPK)
        return
    num_fetched, num_shared = index.fetched_M[path.node], sum(index.shared_G)
    gather_rows(
        arrived, position_n, num_fetched, num_shared, target_nPK, path.blocks, path.local_rank
    )
