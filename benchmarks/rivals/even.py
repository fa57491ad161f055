"""Equal replication of all experts, regardless of their tokens.

A system without any planner gets this by spreading its slots: slot s holds expert s mod E. The
replicas in the source's node share tokens evenly; without one there, all replicas do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


@dataclass(frozen=True)
class Even:
    """Planner whose layout does not depend on the counts."""

    geometry: Geometry
    name: str = "even"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Fill slots cyclically; E <= S makes it legal, C <= E keeps ranks free of duplicates."""
        shape = self.geometry
        slots_S = np.arange(shape.num_slots) % shape.num_experts
        return ExpertLayout.from_slots(shape.num_ranks, shape.capacity, shape.num_experts, slots_S)
