"""Layout together with all its index tensors on the device.

There is no cache: the tensors live as long as their `LayoutIndex`. A layer holds that of the layout
in force, a microbatch its own until its backward is done.

Legend: N ranks, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.direct import DirectIndex, direct_index
from megatron_laer.runtime.comm.reduce import ReduceIndex, reduce_index
from megatron_laer.runtime.comm.restore import RestoreIndex, restore_index


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """One placed layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot; 0 for an empty one, which gets no tokens.
    """

    placed: Placed
    slot_expert_S: torch.Tensor
    # By the arguments that they were built for.
    _restores: dict[tuple[ExpertLayout | None, int, int], RestoreIndex] = field(
        default_factory=dict
    )
    _reduces: dict[tuple[int, int], ReduceIndex] = field(default_factory=dict)
    _direct: dict[tuple[ExpertLayout | None, int], DirectIndex] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.slot_expert_S.device

    def for_direct(self, before: Placed | None, rank: int) -> DirectIndex:
        key = None if before is None else before.layout, rank
        if key not in self._direct:
            self._direct[key] = direct_index(before, self.placed, rank)
        return self._direct[key]

    def for_restore(self, before: Placed | None, node_size: int, rank: int) -> RestoreIndex:
        key = None if before is None else before.layout, node_size, rank
        if key not in self._restores:
            self._restores[key] = restore_index(before, self.placed, node_size, rank, self.device)
        return self._restores[key]

    def for_reduce(self, node_size: int, rank: int) -> ReduceIndex:
        key = node_size, rank
        if key not in self._reduces:
            self._reduces[key] = reduce_index(self.placed, node_size, rank, self.device)
        return self._reduces[key]


def layout_index(placed: Placed, device: torch.device) -> LayoutIndex:
    filled_S = np.maximum(placed.layout.slot_expert_S, 0).astype(np.int64)
    (slot_expert_S,) = upload_arrays([filled_S], device)
    return LayoutIndex(placed, slot_expert_S)
