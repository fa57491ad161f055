"""FlexMoE's scheduler, which changes the previous layout step by step; for comparison only.

Source: "FlexMoE: Scaling Large-scale Sparse Pre-trained Model Training via Dynamic Device
Placement" (SIGMOD 2023), which published no code. As in LAER-MoE's artifact, it runs on freely
restored experts, so that only its choice of a layout is compared. At most ten times per plan, the
expert with the most load per replica gets slots of the expert with the least. Every node that can
spare a slot gives one; a change must lower the largest rank load.

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split

FLEXMOE = "flexmoe"

_MOST_CHANGES = 10


@dataclass(frozen=True)
class FlexMoEStrategy:
    """Strategy that moves replicas while the largest rank load, by even splits, falls."""

    geometry: Geometry
    name: str = FLEXMOE

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        self.geometry.check_counts(counts_NE.shape)
        self.geometry.check_layout(current)
        loads_E = counts_NE.sum(axis=0)
        best = self._largest(counts_NE, current)
        for _ in range(_MOST_CHANGES):
            changed = self._changed(counts_NE, loads_E, current)
            if changed is None or (largest := self._largest(counts_NE, changed)) >= best:
                break
            current, best = changed, largest
        return current

    def _largest(self, counts_NE: Int64, layout: ExpertLayout) -> int:
        loads_S = even_split(layout, self.geometry.node_size).slot_loads(counts_NE)
        return int(loads_S.reshape(layout.num_ranks, -1).sum(axis=1).max())

    def _changed(
        self, counts_NE: Int64, loads_E: Int64, layout: ExpertLayout
    ) -> ExpertLayout | None:
        """Move slots of the coldest expert to the hottest one, on each node that can spare one.

        Nodes keep a replica of every expert that they have, so that tokens stay on their node.
        """
        node_size = self.geometry.node_size
        slots_NC = layout.slot_expert_S.reshape(layout.num_ranks, -1).copy()
        split = even_split(layout, node_size)
        share_E = loads_E / layout.replicas_E
        hot = int(np.argmax(share_E))
        loads_N = split.slot_loads(counts_NE).reshape(slots_NC.shape).sum(axis=1)
        without_N = ~(slots_NC == hot).any(axis=1)
        for cold in np.argsort(share_E, kind="stable").tolist():
            if cold == hot:
                return None
            spare_N = np.repeat(split.node_replicas_QE[:, cold] > 1, node_size)
            can_N = (slots_NC == cold).any(axis=1) & without_N & spare_N
            if can_N.any():
                break
        never = np.iinfo(np.int64).max
        for first in range(0, layout.num_ranks, node_size):
            ranks = slice(first, first + node_size)
            if can_N[ranks].any():
                rank = first + int(np.argmin(np.where(can_N[ranks], loads_N[ranks], never)))
                slots_NC[rank, np.flatnonzero(slots_NC[rank] == cold)[0]] = hot
        return ExpertLayout.from_slots(
            layout.num_ranks, layout.capacity, layout.num_experts, slots_NC.reshape(-1)
        )
