"""Layout on a device, together with this rank's parts of its exchanges.

There is no cache: these live as long as their `LayoutIndex`. A layer holds that of the layout in
force, a microbatch its own until its backward is done.

Legend: N ranks, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.comm.segments import Chain


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """One placed layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot; 0 for an empty one, which gets no tokens.
        chains: of exchanges, by all else that they depend on.
    """

    placed: Placed
    slot_expert_S: torch.Tensor
    chains: dict[Any, Chain] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.slot_expert_S.device


def layout_index(placed: Placed, device: torch.device) -> LayoutIndex:
    filled_S = np.maximum(placed.layout.slot_expert_S, 0).astype(np.int64)
    (slot_expert_S,) = upload_arrays([filled_S], device)
    return LayoutIndex(placed, slot_expert_S)
