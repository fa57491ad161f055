"""A `ReduceIndex` lists the sums over replicas that one rank computes in a reduce.

It holds no gradients and runs no collective.

Legend: E experts, S slots of all ranks; G ranks per node, M nodes, D distinct experts of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.sharding import node_sources
from megatron_laer.runtime.comm.upload import upload_arrays


@dataclass(frozen=True, eq=False)
class ReplicaSums:
    """Lists which parts are added up to each target, in the order of addition.

    Every target has at least one. No target is written by two, so sums need no atomics and have the
    same bits every time.

    Attributes:
        num_targets: how many sums there are.
        csr: from place `csr[d]` to before `csr[d + 1]` are, in `csr` itself, the parts of sum d.
        uploaded: the same on the device.
    """

    num_targets: int
    csr: Int64
    uploaded: torch.Tensor


@dataclass(frozen=True, eq=False)
class ReduceIndex:
    """Lists how one rank sums the gradients of a layout's slots.

    Attributes:
        distinct_M: distinct experts of each node; empty with one node.
        intra_node: sums the node's slots into its D distinct experts, or into all E experts where
            there is but one node; in slot order.
        inter_node: sums what the nodes send, `distinct_M` each, into all E experts; in node order.
            None with one node. It shares the device's memory with `intra_node`.
    """

    distinct_M: list[int]
    intra_node: ReplicaSums
    inter_node: ReplicaSums | None


def reduce_index(
    layout: ExpertLayout, node_size: int, rank: int, device: torch.device
) -> ReduceIndex:
    """Index the sums of a layout as this rank computes them."""
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
    """List the sums by the target of each part, and upload them at once."""
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
