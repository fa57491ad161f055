"""All layouts of home experts in small cases, to compare a construction with the best of them.

Legend: N ranks, E experts, C slots per rank, H = E/N home slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

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
