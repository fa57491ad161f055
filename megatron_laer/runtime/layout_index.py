"""A layout's index tensors on the device, so that no exchange builds them again.

Holds no expert data and runs no collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron_laer.layout import ExpertLayout


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """Index tensors of one layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot.
        rounds: the order in which replicas' gradients are summed. Round j pairs every expert that
            has more than j replicas with its j-th slot, `(experts, slots)` int64. Experts of a
            round are distinct, so adding a round needs no atomics, and each expert's replicas are
            added in slot order: bitwise the same every time.
    """

    layout: ExpertLayout
    slot_expert_S: torch.Tensor
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@lru_cache(maxsize=1024)
def layout_index(layout: ExpertLayout, device: torch.device) -> LayoutIndex:
    """The index tensors of `layout` on `device`."""
    slot_expert_S = np.asarray(layout.slot_expert_S, dtype=np.int64)
    by_expert = np.argsort(slot_expert_S, kind="stable")
    counts_E = np.bincount(slot_expert_S, minlength=layout.num_experts)
    first_E = np.cumsum(counts_E) - counts_E
    rounds = []
    for j in range(int(counts_E.max())):
        experts = np.flatnonzero(counts_E > j)
        slots = by_expert[first_E[experts] + j]
        rounds.append(tuple(torch.from_numpy(x).to(device) for x in (experts, slots)))
    return LayoutIndex(layout, torch.from_numpy(slot_expert_S).to(device), tuple(rounds))
