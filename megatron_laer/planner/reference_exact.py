"""Plain Python that defines what the exact split computes. Only tests use it; it is not fast.

The optimum comes from textbook algorithms that share nothing with the native ones: the largest load
from subsets of experts (Hall's condition) or from augmenting paths, the whole matrix from the loads
by loops over single tokens' worth of intervals.

Shape suffixes: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.geometry import check_node_size
from megatron_laer.planner.quotas import Int64


def least_largest_load(counts_NE: Int64, layout: ExpertLayout) -> int:
    """The least possible largest rank load: over all sets of experts, their tokens per rank.

    Experts of a set can only go to ranks that host one of them; some rank gets at least the
    average, rounded up. That the largest such bound is attained is the max-flow min-cut theorem.
    O(2^E).
    """
    load_E = counts_NE.sum(axis=0)
    ranks_of = [
        {rank for rank in range(layout.num_ranks) if expert in layout.experts_of(rank)}
        for expert in range(layout.num_experts)
    ]
    bound = 0
    for size in range(1, layout.num_experts + 1):
        for experts in combinations(range(layout.num_experts), size):
            ranks = set().union(*(ranks_of[expert] for expert in experts))
            tokens = int(load_E[list(experts)].sum())
            bound = max(bound, -(-tokens // len(ranks)))
    return bound


def exact_quota_NS(
    counts_NE: Int64, loads_S: Int64, layout: ExpertLayout, node_size: int
) -> Int64:
    """The matrix that follows from the loads of all slots, int64 [N, S].

    Own tokens first; then, inside each node, sources in turned order fill replicas in slot order;
    then what is left in nodes in that order fills what is left of replicas in slot order.

    Raises:
        ValueError: a node size that does not divide N.
    """
    check_node_size(layout.num_ranks, node_size)
    quota_NS = np.zeros((layout.num_ranks, layout.num_slots), dtype=np.int64)
    left_NE = counts_NE.copy()
    room_S = loads_S.copy()

    def send(source: int, slot: int, expert: int) -> None:
        amount = min(int(left_NE[source, expert]), int(room_S[slot]))
        quota_NS[source, slot] += amount
        left_NE[source, expert] -= amount
        room_S[slot] -= amount

    for slot, expert in enumerate(layout.to_list()):
        send(slot // layout.capacity, slot, expert)
    for near in (True, False):
        for expert in range(layout.num_experts):
            slots = [slot for slot, held in enumerate(layout.to_list()) if held == expert]
            for node in range(layout.num_ranks // node_size):
                for position in range(node_size):
                    source = node * node_size + (expert + position) % node_size
                    for slot in slots:
                        if not near or slot // layout.capacity // node_size == node:
                            send(source, slot, expert)
    return quota_NS


def off_node_tokens(quota_NS: Int64, layout: ExpertLayout, node_size: int) -> int:
    """Tokens that a whole matrix of quotas sends to another node."""
    source_node_N = np.arange(layout.num_ranks) // node_size
    slot_node_S = np.arange(layout.num_slots) // (layout.capacity * node_size)
    return int(quota_NS[source_node_N[:, None] != slot_node_S].sum())


def off_rank_tokens(quota_NS: Int64, layout: ExpertLayout) -> int:
    """Tokens that a whole matrix of quotas sends to another rank."""
    slot_rank_S = np.arange(layout.num_slots) // layout.capacity
    return int(quota_NS[np.arange(layout.num_ranks)[:, None] != slot_rank_S].sum())
