"""Strategy that never moves an expert: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


@dataclass(frozen=True)
class StaticStrategy:
    """Strategy of `Geometry.static_layout` for any loads and any current layout."""

    geometry: Geometry
    name: str = "static"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        self.geometry.check_counts(counts_NE.shape)
        self.geometry.check_layout(current)
        return self.geometry.static_layout
