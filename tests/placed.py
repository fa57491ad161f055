"""Layouts of tests, placed in a group."""

from __future__ import annotations

from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed


def placed(layout: ExpertLayout, node_size: int = 1, *, at_home: bool = False) -> Placed:
    sharding = Sharding.EXPERTS if at_home else Sharding.ROWS
    num_ranks, capacity, num_experts = layout.shape
    return Placed(layout, Geometry(num_ranks, num_experts, capacity, node_size, sharding))
