"""Replicas of home experts, for known counts: the construction, without prices.

Each rank keeps its E/N home experts in stock's placement. Walker's alias method adds replicas of an
overloaded rank's experts on underloaded ranks, until no rank is above the wanted load. With N = E,
one replica slot per rank is always enough; `Replication.is_ideal` says if it was. The theorem
is in `native/home.cpp`. Plan modes and `greedy` choose among such layouts by predicted time
(`native/home_choice.cpp`).

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native


@dataclass(frozen=True, eq=False)
class Replication:
    """Layout of home experts and replicas.

    Attributes:
        loads_S: tokens of each slot for which the replicas were made; they add up to the counts.
        is_ideal: whether the largest rank load is ceil(total / N), the least of any layout.
    """

    layout: ExpertLayout
    loads_S: Int64
    is_ideal: bool


def replicate(counts_NE: Int64, geometry: Geometry, level: int = 0) -> Replication:
    """Add replicas until no rank has more than `level` tokens, or than the ideal if that is more.

    A rank that is not needed for it keeps its slots empty. No rank gets more tokens than the
    largest load under stock's placement.
    """
    if geometry.sharding != Sharding.EXPERTS:
        raise ValueError("replicas of home experts need --fsep-sharding experts")
    counts_NE = geometry.checked_counts(counts_NE)
    slots_S, loads_S, is_ideal = native.replicate(
        counts_NE, geometry.capacity, geometry.node_size, level
    )
    return Replication(ExpertLayout.from_slots(*geometry.shape, slots_S), loads_S, is_ideal)
