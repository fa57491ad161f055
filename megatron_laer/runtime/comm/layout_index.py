"""Layout together with all its index tensors on the device.

There is no cache: the tensors live as long as their `LayoutIndex`. A layer holds that of the layout
in force, a microbatch its own until its backward is done.

Legend: N ranks, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.sharding import ReplicaSlots
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.direct import DirectIndex, direct_index
from megatron_laer.runtime.comm.reduce import ReduceIndex, reduce_index
from megatron_laer.runtime.comm.restore import RestoreIndex, restore_index


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """One layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot; 0 for an empty one, which gets no tokens.
        home_slots: first slots of each rank, whose experts never move.
        in_fp8: whether the layer's experts compute in fp8, where the run's do.
    """

    layout: ExpertLayout
    slot_expert_S: torch.Tensor
    home_slots: int = 0
    in_fp8: bool = True
    # By the arguments that they were built for.
    _restores: dict[tuple[ExpertLayout | None, int, int], RestoreIndex] = field(
        default_factory=dict
    )
    _reduces: dict[tuple[int, int], ReduceIndex] = field(default_factory=dict)
    _direct: dict[tuple[ExpertLayout | None, int], DirectIndex] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.slot_expert_S.device

    @property
    def replica_slots(self) -> int:
        """Return the number of a rank's slots whose experts are fetched."""
        return self.layout.capacity - self.home_slots

    @cached_property
    def has_replicas(self) -> bool:
        """Return whether any rank of the group fetches an expert."""
        slots_NC = self.layout.slot_expert_S.reshape(self.layout.num_ranks, -1)
        return bool((slots_NC[:, self.home_slots :] != EMPTY).any())

    def for_direct(self, before: ExpertLayout | None, rank: int) -> DirectIndex:
        key = before, rank
        if key not in self._direct:
            self._direct[key] = direct_index(before, self.layout, self.home_slots, rank)
        return self._direct[key]

    def for_restore(self, before: ExpertLayout | None, node_size: int, rank: int) -> RestoreIndex:
        key = before, node_size, rank
        if key not in self._restores:
            self._restores[key] = restore_index(
                None if before is None else ReplicaSlots(before, self.home_slots),
                ReplicaSlots(self.layout, self.home_slots),
                node_size,
                rank,
                self.device,
            )
        return self._restores[key]

    def for_reduce(self, node_size: int, rank: int) -> ReduceIndex:
        key = node_size, rank
        if key not in self._reduces:
            self._reduces[key] = reduce_index(
                ReplicaSlots(self.layout, self.home_slots), node_size, rank, self.device
            )
        return self._reduces[key]


def layout_index(
    layout: ExpertLayout, device: torch.device, home_slots: int = 0, *, in_fp8: bool = True
) -> LayoutIndex:
    filled_S = np.maximum(layout.slot_expert_S, 0).astype(np.int64)
    (slot_expert_S,) = upload_arrays([filled_S], device)
    return LayoutIndex(layout, slot_expert_S, home_slots, in_fp8)
