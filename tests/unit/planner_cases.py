"""Counts of the kinds that planners get wrong, for property tests.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout

KINDS = ("zero", "one token", "one expert", "one source", "few", "even", "zipf")


def counts_of(kind: str, geometry: Geometry, seed: int) -> Int64:
    rng = np.random.default_rng(seed)
    shape = (geometry.num_ranks, geometry.num_experts)
    counts_NE = np.zeros(shape, dtype=np.int64)
    if kind == "one token":
        counts_NE[seed % shape[0], seed % shape[1]] = 1
    elif kind == "one expert":
        counts_NE[:, seed % shape[1]] = 100
    elif kind == "one source":
        counts_NE[seed % shape[0]] = rng.integers(0, 1000, shape[1])
    elif kind == "few":
        counts_NE = rng.integers(0, 2, shape)
    elif kind == "even":
        counts_NE = rng.integers(0, 1000, shape)
    elif kind == "zipf":
        share_E = rng.permutation(1.0 / np.arange(1, shape[1] + 1) ** 1.3)
        counts_NE = rng.multinomial(700, share_E / share_E.sum(), size=shape[0])
    return counts_NE.astype(np.int64)


def any_counts(geometry: Geometry, seed: int) -> Int64:
    return counts_of(KINDS[seed % len(KINDS)], geometry, seed)


def with_holes(layout: ExpertLayout, share: float, seed: int) -> ExpertLayout:
    """Empty this share of the slots at random, as far as every expert keeps one."""
    rng = np.random.default_rng(seed)
    slots_S = layout.slot_expert_S.copy()
    for slot in rng.permutation(layout.num_slots)[: round(share * layout.num_slots)]:
        if (slots_S == slots_S[slot]).sum() > 1:
            slots_S[slot] = EMPTY
    return ExpertLayout.from_slots(*layout.shape, slots_S)


@st.composite
def geometries(
    draw: st.DrawFn, max_ranks: int, max_experts: int, spare: int = 4, balances: bool = False
) -> Geometry:
    """Draw any N, E, C and G that divides N; if wanted, with slots for perfect balance."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    least = -(-num_experts // num_ranks)
    if balances:
        least = min(num_experts, 1 + -(-(num_experts - 1) // num_ranks))
    capacity = draw(st.integers(least, min(num_experts, least + spare)))
    node_size = draw(st.sampled_from([g for g in range(1, num_ranks + 1) if num_ranks % g == 0]))
    return Geometry(num_ranks, num_experts, capacity, node_size)


@st.composite
def home_geometries(draw: st.DrawFn, most_experts: int = 24) -> Geometry:
    num_ranks, node_size = draw(st.sampled_from([(2, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4)]))
    home = draw(st.integers(1, max(most_experts // num_ranks, 1)))
    capacity = min(num_ranks * home, home + draw(st.integers(1, 3)))
    return Geometry(num_ranks, num_ranks * home, capacity, node_size, Sharding.EXPERTS)
