"""A layout in its group: owners of experts, and the slots that a restore fills.

`planner.hops` has the ways from owners to slots.

Legend: N ranks, E experts, C replica slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout


def row_bounds(rows: int, num_ranks: int) -> list[int]:
    """Return the N + 1 bounds of the ranks' row blocks, which differ by at most one row."""
    return [rank * rows // num_ranks for rank in range(num_ranks + 1)]


@dataclass(frozen=True)
class Placed:
    """A layout, where it lies: in a group with nodes, whose ranks own rows of experts.

    With `Sharding.ROWS` every rank owns a block of rows of each expert, and all slots are replica
    slots. With `Sharding.EXPERTS` one rank owns all rows of an expert, in one of its home slots,
    whose experts never move.

    Attributes:
        quantised: whether the layer's experts travel as payloads, where the run's do.
    """

    layout: ExpertLayout
    geometry: Geometry
    quantised: bool = True

    def __post_init__(self) -> None:
        self.geometry.check_shape_of(self.layout)

    @cached_property
    def replica_expert_S(self) -> npt.NDArray[np.int16]:
        """Return the expert of each replica slot, or `EMPTY`, rank by rank."""
        slots_NC = self.layout.slot_expert_S.reshape(self.geometry.num_ranks, -1)
        return slots_NC[:, self.geometry.home_slots :].reshape(-1)

    @cached_property
    def filled_S(self) -> Bool:
        """Return the replica slots with an expert."""
        return np.asarray(self.replica_expert_S != EMPTY)

    @cached_property
    def has_replicas(self) -> bool:
        """Return whether any rank of the group fetches an expert."""
        return bool(self.filled_S.any())

    def changed_S(self, before: Placed | None) -> Bool:
        """Return the replica slots to fetch where ranks keep the experts of `before`, if any."""
        if before is None:
            return self.filled_S
        return np.asarray(self.filled_S & (self.replica_expert_S != before.replica_expert_S))
