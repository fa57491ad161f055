"""The scheduler FlexMoE, from its description in the paper (SIGMOD 2023, arXiv 2304.03946).

Each step starts from the layout in use. The expert with most load per replica expands by one, and
the one with least shrinks by one in its place. A step stays if the largest rank load falls, else
planning ends. Replicas share tokens evenly. No public code exists. Ours moves experts for free, as
sharded experts can, and uses the best slot among all that the shrinking expert has.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout

_STEPS = 10


@dataclass(frozen=True)
class FlexMoE:
    """Planner that expands and shrinks the layout in use, at most ten times per plan."""

    geometry: Geometry
    name: str = "flexmoe"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the layout after the last step that helped."""
        shape = self.geometry
        loads_E = counts_NE.sum(axis=0).astype(np.float64)
        slots_S = current.slot_expert_S.astype(np.int64)
        largest = self._rank_loads_N(slots_S, loads_E).max()
        for _ in range(_STEPS):
            replicas_E = np.bincount(slots_S, minlength=shape.num_experts)
            per_replica_E = loads_E / replicas_E
            grow = int(np.argmax(per_replica_E))
            can_shrink_E = replicas_E > 1
            can_shrink_E[grow] = False
            if not can_shrink_E.any():
                break
            shrink = int(np.argmin(np.where(can_shrink_E, per_replica_E, np.inf)))
            tries = []
            for slot in np.flatnonzero(slots_S == shrink):
                rank = slot // shape.capacity
                if grow in slots_S[rank * shape.capacity : (rank + 1) * shape.capacity]:
                    continue
                changed_S = slots_S.copy()
                changed_S[slot] = grow
                tries.append((float(self._rank_loads_N(changed_S, loads_E).max()), changed_S))
            if not tries:
                break
            best, changed_S = min(tries, key=lambda tried: tried[0])
            if best >= largest:
                break
            largest, slots_S = best, changed_S
        return ExpertLayout.from_slots(shape.num_ranks, shape.capacity, shape.num_experts, slots_S)

    def _rank_loads_N(self, slots_S: Int64, loads_E: np.ndarray) -> np.ndarray:
        replicas_E = np.bincount(slots_S, minlength=self.geometry.num_experts)
        per_replica_E = loads_E / replicas_E
        return per_replica_E[slots_S].reshape(self.geometry.num_ranks, -1).sum(axis=1)
