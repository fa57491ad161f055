"""`Even` replicates every expert as often as every other, wherever its tokens are.

It is what a system gets without any planner if it spreads its slots: slot s holds expert s mod E,
and tokens are shared evenly among the replicas in the source's node, else among all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


@dataclass(frozen=True)
class Even:
    """The same layout whatever the counts."""

    geometry: Geometry
    name: str = "even"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Slots filled cyclically; E <= S makes it legal, C <= E keeps ranks free of duplicates."""
        shape = self.geometry
        slots_S = np.arange(shape.num_slots) % shape.num_experts
        return ExpertLayout.from_slots(shape.num_ranks, shape.capacity, shape.num_experts, slots_S)
