"""These plain loops define what the fast code computes. Only tests use this file; it is not fast.

Legend: N ranks, E experts, S = N*C slots.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.geometry import check_node_size


def quota_NS(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Int64:
    """Return the even split as a whole matrix: tokens from each source to each slot, int64 [N, S].

    Raises:
        ValueError: a node size that does not divide N.
    """
    check_node_size(layout.num_ranks, node_size)
    experts = layout.to_list()
    quota = np.zeros((layout.num_ranks, layout.num_slots), dtype=np.int64)
    for source in range(layout.num_ranks):
        for expert in range(layout.num_experts):
            replicas = [slot for slot, held in enumerate(experts) if held == expert]
            in_node = [
                slot
                for slot in replicas
                if slot // layout.capacity // node_size == source // node_size
            ]
            chosen = in_node or replicas
            share, left = divmod(int(counts_NE[source, expert]), len(chosen))
            for slot in chosen:
                quota[source, slot] = share
            for extra in range(left):
                quota[source, chosen[(source + extra) % len(chosen)]] += 1
    return quota
