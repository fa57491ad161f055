"""Homes by a permutation: the expert at each home position of a layer.

Home position p is home slot p % (E/N) of rank p // (E/N). Behind the router everything works with
positions in place of experts. Where experts have names, as in checkpoints and recordings, they are
translated here. Stock's placement has expert p at position p. `homes_file` has the file of them.

Legend: N ranks, E experts or home positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.layout import EMPTY, ExpertLayout


@dataclass(frozen=True, eq=False)
class HomeOrder:
    """Experts of a layer in the order of their homes; `expert_E` is a permutation of 0 to E - 1."""

    expert_E: Int64

    def __post_init__(self) -> None:
        check_permutation(self.expert_E)

    @classmethod
    def stock(cls, num_experts: int) -> HomeOrder:
        return cls(np.arange(num_experts))

    @cached_property
    def position_E(self) -> Int64:
        """Return the home position of each expert."""
        return np.argsort(self.expert_E)

    @cached_property
    def is_stock(self) -> bool:
        return bool((self.expert_E == np.arange(len(self.expert_E))).all())

    def by_position(self, values_E: Int64) -> Int64:
        """Order the last axis, one value per expert, by home position."""
        return values_E if self.is_stock else np.ascontiguousarray(values_E[..., self.expert_E])

    def by_expert[Values: (Int64, Bool)](self, values_E: Values) -> Values:
        """Order the last axis, one value per home position, by expert."""
        return values_E if self.is_stock else np.ascontiguousarray(values_E[..., self.position_E])

    def pairs_by_expert(self, pairs_EE: Int64) -> Int64:
        """Order both axes, of home positions, by expert."""
        return self.by_expert(self.by_expert(pairs_EE).T)

    def layout_of_experts(self, layout: ExpertLayout) -> ExpertLayout:
        """Return a layout of home positions with experts' numbers."""
        return self._renumbered(layout, self.expert_E)

    def layout_of_positions(self, layout: ExpertLayout) -> ExpertLayout:
        """Return a layout of experts with their home positions' numbers."""
        return self._renumbered(layout, self.position_E)

    def _renumbered(self, layout: ExpertLayout, number_E: Int64) -> ExpertLayout:
        if self.is_stock:
            return layout
        slots_S = layout.slot_expert_S
        return ExpertLayout.from_slots(
            *layout.shape, np.where(slots_S == EMPTY, EMPTY, number_E[slots_S])
        )


def home_digest(homes: Sequence[HomeOrder]) -> str:
    """Return a name of the homes of a rank's layers, empty for stock's placement."""
    if all(home.is_stock for home in homes):
        return ""
    content = b"".join(home.expert_E.astype("<i8").tobytes() for home in homes)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def check_permutation(expert_E: Int64 | Sequence[int]) -> None:
    """Refuse homes that are no permutation of the experts, and quote the first wrong one."""
    experts = [int(expert) for expert in expert_E]
    seen: set[int] = set()
    for position, expert in enumerate(experts):
        if not 0 <= expert < len(experts) or expert in seen:
            why = "has a home already" if expert in seen else f"is not in 0..{len(experts) - 1}"
            raise ValueError(
                f"expert {expert} at home position {position} {why}; homes must be a permutation "
                "of the experts"
            )
        seen.add(expert)
