"""Replicas of home experts, step by step, and all layouts of small cases with the best of them.

Legend: N ranks, E experts, C slots per rank, H = E/N home slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


def all_layouts(geometry: Geometry) -> Iterator[ExpertLayout]:
    """Yield every layout of home experts, with all replica slots used."""
    home, spare = geometry.home_slots, geometry.capacity - geometry.home_slots
    homes = [tuple(range(rank * home, (rank + 1) * home)) for rank in range(geometry.num_ranks)]
    others = [[e for e in range(geometry.num_experts) if e not in own] for own in homes]
    for taken in product(*(combinations(experts, spare) for experts in others)):
        slots = [expert for own, more in zip(homes, taken, strict=True) for expert in (*own, *more)]
        yield ExpertLayout.from_slots(*geometry.shape, slots)


def least_of_all(counts_NE: Int64, geometry: Geometry) -> int:
    """Return the least largest rank load of any layout; more replicas never hurt."""
    loads = (
        exact_split(layout, geometry.node_size).solve(counts_NE).rank_loads_N()
        for layout in all_layouts(geometry)
    )
    return min(int(loads_N.max()) for loads_N in loads)


_COMPARED = 8  # most loaded givers, of whose experts one is sought that the taker's node wants


def replicas(counts_NE: Int64, geometry: Geometry, level: int) -> list[dict[int, int]]:
    """Return the tokens of each rank's replicas by expert, by the steps of `home.cpp`."""
    home, size = geometry.home_slots, geometry.node_size
    spare = geometry.capacity - home
    left_E = [int(tokens) for tokens in counts_NE.sum(axis=0)]
    node_QE = counts_NE.reshape(-1, size, geometry.num_experts).sum(axis=1)
    load_N = [int(load) for load in np.reshape(left_E, (-1, home)).sum(axis=1)]
    made: list[dict[int, int]] = [{} for _ in load_N]
    level = max(level, -(-sum(load_N) // len(load_N)))

    def experts_of(giver: int) -> list[int]:
        experts = range(giver * home, (giver + 1) * home)
        return sorted(experts, key=lambda expert: (-left_E[expert], expert))

    while True:
        ranks = range(len(load_N))
        takers = [rank for rank in ranks if load_N[rank] < level and len(made[rank]) < spare]
        givers = sorted(
            (rank for rank in ranks if load_N[rank] > level), key=lambda rank: (-load_N[rank], rank)
        )
        if not (takers and givers):
            return made
        taker = min(takers, key=lambda rank: (load_N[rank], rank))
        room, node = level - load_N[taker], taker // size
        largest = [experts_of(giver)[0] for giver in givers]
        in_node = [experts_of(giver)[0] for giver in givers if giver // size == node]
        wanted = [
            expert
            for giver in givers[:_COMPARED]
            for expert in experts_of(giver)
            if giver // size != node and left_E[expert] >= room and node_QE[node, expert] > 0
        ]
        fills = [expert for expert in (*in_node[:1], largest[0]) if left_E[expert] >= room]
        if wanted:
            expert = max(wanted, key=lambda expert: min(room, node_QE[node, expert]))
        elif fills:
            expert = fills[0]
        else:
            expert = min(largest, key=lambda expert: (-left_E[expert], expert // home))
        tokens = min(room, left_E[expert])
        made[taker][expert] = tokens
        left_E[expert] -= tokens
        load_N[taker] += tokens
        load_N[expert // home] -= tokens
