"""Plain Python definitions of the native code's results, for tests only. They are slow.

The matrix of quotas comes from the loads of slots, token by token in order. Replicas in proportion
to load come from fractions, the nodes' hosted experts from sorted lists. The construction for known
counts has no double here: its definition is its result, perfect balance.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry, check_node_size
from megatron_laer.planner.layout import ExpertLayout


def exact_quota_NS(counts_NE: Int64, loads_S: Int64, layout: ExpertLayout, node_size: int) -> Int64:
    """Return the matrix that follows from the loads of all slots, int64 [N, S].

    Own tokens first. Then as many as fit fill replicas of their node in slot order, of each source
    the same share, rounded down over the first sources. The rest, in the order of nodes and
    sources, fills the remaining room of replicas in slot order.
    """
    check_node_size(layout.num_ranks, node_size)
    quota_NS = np.zeros((layout.num_ranks, layout.num_slots), dtype=np.int64)
    left_NE = counts_NE.copy()
    room_S = loads_S.copy()

    def send(source: int, slot: int, expert: int, most: int) -> int:
        amount = min(most, int(left_NE[source, expert]), int(room_S[slot]))
        quota_NS[source, slot] += amount
        left_NE[source, expert] -= amount
        room_S[slot] -= amount
        return amount

    for slot, expert in enumerate(layout.to_list()):
        source = slot // layout.capacity
        send(source, slot, expert, int(left_NE[source, expert]))
    for expert in range(layout.num_experts):
        slots = [slot for slot, held in enumerate(layout.to_list()) if held == expert]
        for node in range(layout.num_ranks // node_size):
            sources = range(node * node_size, (node + 1) * node_size)
            inside = [slot for slot in slots if slot // layout.capacity in sources]
            tokens = [int(left_NE[source, expert]) for source in sources]
            near = min(sum(tokens), int(room_S[inside].sum()))
            first = 0
            for source, number in zip(sources, tokens, strict=True):
                last = first + number
                left = near * last // max(sum(tokens), 1) - near * first // max(sum(tokens), 1)
                for slot in inside:
                    left -= send(source, slot, expert, left)
                first = last
        for source in range(layout.num_ranks):
            for slot in slots:
                send(source, slot, expert, int(left_NE[source, expert]))
    return quota_NS


def off_node_tokens(quota_NS: Int64, layout: ExpertLayout, node_size: int) -> int:
    source_node_N = np.arange(layout.num_ranks) // node_size
    slot_node_S = np.arange(layout.num_slots) // (layout.capacity * node_size)
    return int(quota_NS[source_node_N[:, None] != slot_node_S].sum())


def off_rank_tokens(quota_NS: Int64, layout: ExpertLayout) -> int:
    slot_rank_S = np.arange(layout.num_slots) // layout.capacity
    return int(quota_NS[np.arange(layout.num_ranks)[:, None] != slot_rank_S].sum())


def proportional_experts(counts_NE: Int64, geometry: Geometry) -> list[list[int]]:
    """Return each rank's experts: replicas in proportion to load, placed heaviest first.

    Every expert counts as having a quarter of the mean load more. Nodes whose slots suffice are
    served one by one, on their own tokens. A replica goes to the node with most tokens of its
    expert that no replica there serves yet. There, candidates are the eight least loaded ranks
    without the expert, at most half a replica's load above the least of them. The first candidate
    without a link to the expert's other ranks by shared experts wins, else the one that shares
    fewest with them.
    """
    per_node = geometry.num_experts <= geometry.node_size * (geometry.capacity - 1)
    size = geometry.node_size if per_node else geometry.num_ranks
    experts: list[list[int]] = []
    for first in range(0, geometry.num_ranks, size):
        experts += _proportional_part(counts_NE[first : first + size], geometry)
    return experts


def hosted_by_node(counts_NE: Int64, geometry: Geometry, most_experts: int) -> list[set[int]]:
    """Return the experts that each node hosts where it has places for `most_experts` only.

    Every expert, largest first, goes to the node with most of its tokens that has a place, or the
    emptier of equals. Places left go to a node's largest experts.
    """
    shape = geometry.num_nodes, geometry.node_size, geometry.num_experts
    node_counts_QE = counts_NE.reshape(shape).sum(axis=1)
    places = min(most_experts, geometry.num_experts)
    hosted: list[set[int]] = [set() for _ in range(geometry.num_nodes)]
    for expert in sorted(
        range(geometry.num_experts), key=lambda e: (-node_counts_QE[:, e].sum(), e)
    ):
        free = [node for node in range(geometry.num_nodes) if len(hosted[node]) < places]
        best = min(free, key=lambda q: (-node_counts_QE[q, expert], len(hosted[q]), q))
        hosted[best].add(expert)
    for node, experts in enumerate(hosted):
        others = [e for e in range(geometry.num_experts) if e not in experts]
        others = [e for e in others if node_counts_QE[node, e] or places == geometry.num_experts]
        others.sort(key=lambda e: (-node_counts_QE[node, e], e))
        experts |= set(others[: places - len(experts)])
    return hosted


def _proportional_part(counts_NE: Int64, geometry: Geometry) -> list[list[int]]:
    num_ranks, num_experts = counts_NE.shape
    prior = int(counts_NE.sum()) // (4 * num_experts)
    loads = [int(load) + prior for load in counts_NE.sum(axis=0)]
    replicas = [1] * num_experts
    for _ in range(num_ranks * geometry.capacity - num_experts):
        growing = [expert for expert in range(num_experts) if replicas[expert] < num_ranks]
        if not growing:
            break
        hottest = min(growing, key=lambda e: (-Fraction(loads[e], replicas[e]), replicas[e], e))
        replicas[hottest] += 1

    order = sorted(range(num_experts), key=lambda e: (-Fraction(loads[e], replicas[e]), e))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    rank_loads = [0] * num_ranks
    node_counts_QE = counts_NE.reshape(-1, geometry.node_size, num_experts).sum(axis=1)
    for expert in order:
        unserved = node_counts_QE[:, expert].tolist()
        share = loads[expert] // replicas[expert]
        chosen: list[int] = []
        for _ in range(replicas[expert]):
            free = [
                rank
                for rank in range(num_ranks)
                if len(held[rank]) < geometry.capacity and expert not in held[rank]
            ]
            if not free:
                break
            first = min(free, key=lambda r: (-unserved[r // geometry.node_size], rank_loads[r], r))
            node = first // geometry.node_size
            close = [
                rank
                for rank in sorted(free, key=lambda r: (rank_loads[r], r))
                if rank // geometry.node_size == node
                and rank_loads[rank] <= rank_loads[first] + share // 2
            ]
            rank = min(close[:8], key=lambda r: _links(r, chosen, held))
            held[rank].append(expert)
            chosen.append(rank)
            rank_loads[rank] += share
            unserved[node] -= share
    for experts in held:
        experts += [e for e in order if e not in experts][: geometry.capacity - len(experts)]
    return [sorted(experts) for experts in held]


def _links(rank: int, chosen: list[int], held: list[list[int]]) -> int:
    """Return 0 if no chain of shared experts leads from a rank to the chosen, else 1 or more."""
    reached = set(chosen)
    while True:
        experts = {expert for other in reached for expert in held[other]}
        more = {r for r, hosted in enumerate(held) if experts & set(hosted)} | reached
        if more == reached:
            break
        reached = more
    if rank not in reached:
        return 0
    beside = {expert for other in chosen for expert in held[other]}
    return 1 + len(beside & set(held[rank]))
