"""A `ReduceIndex` lists the sums over replicas that one rank computes in a reduce.

It holds no gradients and runs no collective.

Legend: E experts, S slots of all ranks; G ranks per node, M nodes, D distinct experts of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.runtime.comm.upload import upload_arrays
from megatron_laer.sharding import node_sources

# Pairs of index tensors: targets, all distinct, and the sources that are added to them.
Rounds = tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True, eq=False)
class ReduceIndex:
    """Lists how one rank sums the gradients of a layout's slots.

    Attributes:
        distinct_M: distinct experts of each node; empty with one node.
        intra_node: sums the node's slots into its D distinct experts, or into all E experts where
            there is but one node; in slot order.
        inter_node: sums what the nodes send, `distinct_M` each, into all E experts; in node order.
    """

    distinct_M: list[int]
    intra_node: Rounds
    inter_node: Rounds


def reduce_index(
    layout: ExpertLayout, node_size: int, rank: int, device: torch.device
) -> ReduceIndex:
    """Index the sums of a layout as this rank computes them."""
    expert_S = layout.slot_expert_S.astype(np.int64)
    if layout.num_ranks == node_size:
        return ReduceIndex([], _rounds(expert_S, device), ())
    node = rank // node_size
    all_S = np.ones(layout.num_slots, dtype=np.bool_)
    node_of_pair, experts = np.divmod(
        node_sources(layout, node_size, all_S).fetched_pairs, layout.num_experts
    )
    slots = node_size * layout.capacity
    expert_of_node_slot = expert_S[node * slots : (node + 1) * slots]
    intra_node = np.searchsorted(experts[node_of_pair == node], expert_of_node_slot)
    return ReduceIndex(
        distinct_M=np.bincount(node_of_pair, minlength=layout.num_ranks // node_size).tolist(),
        intra_node=_rounds(intra_node, device),
        inter_node=_rounds(experts, device),
    )


def _rounds(target_of_source: Int64, device: torch.device) -> Rounds:
    """Order the additions of sources to their targets.

    Round j pairs every target that has more than j sources with its j-th source. Targets of a round
    are distinct, so adding a round needs no atomics, and a target's sources are added in their
    order: bitwise the same every time. Every target has a source, so round 0 has all of them.
    """
    by_target = np.argsort(target_of_source, kind="stable")
    counts = np.bincount(target_of_source)
    first = np.cumsum(counts) - counts
    arrays: list[Int64] = []
    for j in range(int(counts.max())):
        targets = np.flatnonzero(counts > j)
        arrays += [targets, by_target[first[targets] + j]]
    tensors = upload_arrays(arrays, device)
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))
