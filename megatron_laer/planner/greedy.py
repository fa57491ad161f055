"""The default strategy makes the layout that exact quotas balance best when loads have drifted.

What it does depends on how scarce slots are. With fewer than two spare slots per rank, S - E < 2*N,
it is the construction for these counts, with headroom for every expert: its pair graph is
connected, so load can flow from any rank to any other when counts drift. With more, it is replicas
in proportion to load (with a little for experts that grow out of nothing), heaviest first on a
rank that is about the least loaded and links the pair graph, inside each node on the node's own
tokens where that fits. What was chosen on which data is in `docs/planner.md`.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.construct import checked_counts, from_native
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.native_core import native


@dataclass(frozen=True)
class GreedyStrategy:
    """Constructs a layout or takes proportional replicas, in near-linear time; deterministic."""

    geometry: Geometry
    name: str = "greedy"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the next layout; where it holds what `current` holds, it stays in place.

        Args:
            counts_NE: forecast tokens on each source rank for each expert, int64 [N, E].
            current: the layout in use.

        Raises:
            ValueError: counts or a layout of another shape, or negative counts.
        """
        counts_NE = checked_counts(counts_NE, self.geometry)
        self.geometry.check_layout(current)
        slots_S = native.greedy(counts_NE, current.slot_expert_S, self.geometry.node_size)
        return from_native(slots_S, current)
