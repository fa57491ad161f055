"""Slower strategy: a search, in the background, for the layout that holds up best under drift.

A layout's score is its largest load after exact quotas, summed over disturbed copies of the
forecast (each expert's load times a random factor). Tokens whose node lacks their expert count a
little. The search starts from the best of the current layout, the two ways of `greedy` and
constructions for other disturbed copies. It improves that layout by single exchanges of slots;
home experts keep theirs, and a replica that makes next to no difference is dropped.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.planner.construct import checked_counts, from_native
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native

# Any fixed number will do: the same forecast gives the same layout.
_SEED = 2602
_FULL_EFFORT_SLOTS = 64


@dataclass(frozen=True)
class SearchStrategy:
    """Local random search of slots, deterministic by a fixed seed.

    Attributes:
        scenarios: disturbed copies of the forecast that score a layout.
        candidates: constructions for further disturbed copies to start from.
        exchanges: tries to improve the best of them, on up to 64 slots; proportionally fewer with
            more slots, as each takes longer. About 40 ms at N = 16, C = 3, E = 32.
    """

    geometry: Geometry
    scenarios: int = 32
    candidates: int = 8
    exchanges: int = 600
    name: str = "search"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the next layout; `current` stays if none is better."""
        counts_NE = checked_counts(counts_NE, self.geometry)
        self.geometry.check_layout(current)
        slots_S = native.search(
            counts_NE,
            current.slot_expert_S,
            self.geometry.node_size,
            self.geometry.home_slots,
            self.scenarios,
            self.candidates,
            self.exchanges * _FULL_EFFORT_SLOTS // max(_FULL_EFFORT_SLOTS, self.geometry.num_slots),
            _SEED,
        )
        return from_native(slots_S, current)
