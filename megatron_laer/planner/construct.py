"""Construction of a fresh layout on every rank, from a microbatch's counts after the gate.

With C >= ceil(E/N) + 1 slots per rank (more exactly, E <= N*(C-1) + 1), it allows perfect balance
for any counts. Exact quotas then load no rank with more than ceil(total / N) tokens. Few tokens
leave their node: none, if nodes have equally many tokens and C >= ceil(E/G) + 1. `greedy` makes
layouts from older counts, and `exact` splits tokens.

Legend: N ranks, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native


def construct_layout(
    counts_NE: Int64,
    current: ExpertLayout,
    node_size: int,
    sharding: Sharding = Sharding.ROWS,
) -> ExpertLayout:
    """Construct the layout for exactly these counts [N, E], the same on every rank and machine.

    With fewer slots than `always_balances` needs, replicas are in proportion to load. Inside a
    node, experts stay on ranks and in slots of `current` where the new layout has them too. Experts
    at home stay there, and as many replicas are added as balance needs (`home.replicate`).
    """
    num_ranks, capacity, num_experts = current.shape
    geometry = Geometry(num_ranks, num_experts, capacity, node_size, sharding)
    counts_NE = geometry.checked_counts(counts_NE)
    slots_S = native.construct(counts_NE, current.slot_expert_S, node_size, geometry.home_slots)
    return from_native(slots_S, current)


def always_balances(geometry: Geometry) -> bool:
    """Return whether perfect balance exists for all counts: E <= N*(C-1) + 1."""
    return geometry.num_experts <= geometry.num_ranks * (geometry.capacity - 1) + 1


def from_native(
    slots_S: np.ndarray[tuple[int, ...], np.dtype[np.int16]], current: ExpertLayout
) -> ExpertLayout:
    """Return a layout of `current`'s shape; `current` itself if the slots are its own."""
    slot_bytes = slots_S.astype("<i2", copy=False).tobytes()
    if slot_bytes == current.slot_bytes:
        return current
    return ExpertLayout(*current.shape, slot_bytes)
