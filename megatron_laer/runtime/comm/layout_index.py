"""A `LayoutIndex` is a layout together with its slot map on the device, made once per layout.

What a restore and a reduce look up beside it is in `restore_index.py` and `reduce_index.py`.

Legend: N ranks, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron_laer.layout import ExpertLayout
from megatron_laer.runtime.comm.upload import upload_arrays

# Layouts whose index tensors are cached: those in force in all layers of a stage, and fresh ones.
CACHED_LAYOUTS = 256


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """Holds one layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot.
    """

    layout: ExpertLayout
    slot_expert_S: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Return the device that the index tensors live on."""
        return self.slot_expert_S.device


@lru_cache(maxsize=CACHED_LAYOUTS)
def layout_index(layout: ExpertLayout, device: torch.device) -> LayoutIndex:
    """Upload the slot map of `layout` to `device`, once."""
    (slot_expert_S,) = upload_arrays([layout.slot_expert_S.astype(np.int64)], device)
    return LayoutIndex(layout, slot_expert_S)
