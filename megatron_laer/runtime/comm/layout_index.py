"""Layout on a device, together with this rank's parts of its exchanges.

There is no cache: these live as long as their `LayoutIndex`. A layer holds that of the layout in
force, a microbatch its own until its backward is done.

Legend: N ranks, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_laer.planner.hops import Way
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.moves import Chain


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """One placed layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot; 0 for an empty one, which gets no tokens.
    """

    placed: Placed
    slot_expert_S: torch.Tensor
    # By the arguments that they were made for.
    _chains: dict[tuple[Way, ExpertLayout | None, int], Chain] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.slot_expert_S.device

    def chain(self, way: Way, before: Placed | None, rank: int) -> Chain:
        key = way, None if before is None else before.layout, rank
        if key not in self._chains:
            self._chains[key] = Chain(way, self.placed, before, rank, self.device)
        return self._chains[key]


def layout_index(placed: Placed, device: torch.device) -> LayoutIndex:
    filled_S = np.maximum(placed.layout.slot_expert_S, 0).astype(np.int64)
    (slot_expert_S,) = upload_arrays([filled_S], device)
    return LayoutIndex(placed, slot_expert_S)
