"""The alias method for home experts in Python, cubic.

The most underloaded rank with a free replica slot fills its room from one expert of an overloaded
rank. It prefers an expert that fills the room, then its own node, then the most loaded giver.

Legend: N ranks, E experts, C slots per rank, H = E/N home slots.
"""

from __future__ import annotations

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout


def replicas(counts_NE: Int64, geometry: Geometry) -> list[list[int]]:
    """Return each rank's replicas."""
    num_ranks, home = geometry.num_ranks, geometry.home_slots
    at_home = [int(load) for load in counts_NE.sum(axis=0)]
    ideal = -(-sum(at_home) // num_ranks)
    ranks = range(num_ranks)
    load = [sum(at_home[rank * home : (rank + 1) * home]) for rank in ranks]
    taken: list[list[int]] = [[] for _ in ranks]
    while True:
        takers = [r for r in ranks if load[r] < ideal and len(taken[r]) < geometry.capacity - home]
        givers = [rank for rank in ranks if load[rank] > ideal]
        if not takers or not givers:
            return taken
        taker = min(takers, key=lambda rank: (load[rank], rank))
        room = ideal - load[taker]

        def price(expert: int, taker: int = taker, room: int = room) -> tuple[int, bool, int]:
            giver = expert // home
            is_far = giver // geometry.node_size != taker // geometry.node_size
            return max(room - at_home[expert], 0), is_far, -load[giver]

        expert = min((e for e in range(geometry.num_experts) if e // home in givers), key=price)
        given = min(room, at_home[expert])
        at_home[expert] -= given
        load[expert // home] -= given
        load[taker] += given
        taken[taker].append(expert)


def layout_of(taken: list[list[int]], geometry: Geometry) -> ExpertLayout:
    """Write replicas behind home experts: ascending, empty slots last."""
    home, slots = geometry.home_slots, []
    for rank, experts in enumerate(taken):
        empty = [EMPTY] * (geometry.capacity - home - len(experts))
        slots += [*range(rank * home, (rank + 1) * home), *sorted(experts), *empty]
    return ExpertLayout.from_slots(*geometry.shape, slots)
