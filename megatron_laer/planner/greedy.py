"""Default strategy: the layout that exact quotas make fastest when loads have drifted.

Where every node has slots for all experts, replicas are in proportion to load, with a little for
experts that grow from nothing. They are placed inside each node by the node's own tokens, heaviest
first. Each goes to a rank that is about the least loaded and links the pair graph.

Elsewhere the cost model chooses among two or three layouts, over the forecast and disturbed copies:

- One that is robust to drift. With fewer than two spare slots per rank, S - E < 2*N, it is the
  construction for these counts with headroom for every expert. Its pair graph is connected, so load
  can flow from any rank to any other. With more slots, replicas are in proportion over all nodes.
- Where slots are as scarce, the construction for known counts: more tokens stay in their node.
- Replicas in proportion inside each node, which hosts its largest experts and a replica per rank.

Experts at home (`--fsep-sharding experts`) keep their slots; the cost model chooses the replicas.
Candidates are stock's placement and layouts with more and more replicas for balance. Others fill
all slots, for drift and for tokens that stay in their node (`native/home_choice.cpp`).

`docs/internals/planner.md` has the data behind these choices.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_laer.arrays import Int64
from megatron_laer.planner.construct import from_native
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native


@dataclass(frozen=True)
class GreedyStrategy:
    """Strategy of fewest predicted seconds; without costs, the drift-robust layout."""

    geometry: Geometry
    costs: CostModel | None = None
    name: str = "greedy"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the next layout; experts that it shares with `current` stay in place."""
        counts_NE = self.geometry.checked_counts(counts_NE)
        self.geometry.check_layout(current)
        slots_S = native.greedy(
            counts_NE,
            current.slot_expert_S,
            self.geometry.node_size,
            self.geometry.home_slots,
            self._native_costs,
        )
        return from_native(slots_S, current)

    @cached_property
    def _native_costs(self) -> native.CostModel | None:
        return None if self.costs is None else self.costs.for_native(self.geometry)
