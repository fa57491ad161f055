"""Rivals of the benchmark: legal layouts, conserved tokens, and balance."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.rivals.eplb import Eplb, split_among_all
from benchmarks.rivals.even import Even
from benchmarks.rivals.flexmoe import FlexMoE
from benchmarks.splits import Planner, split_evenly, split_like_eplb
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


@pytest.mark.parametrize("rival", [Even, Eplb, FlexMoE])
@pytest.mark.parametrize("shape", [(16, 32, 3), (8, 5, 4), (4, 12, 3), (1, 3, 3)])
def test_rivals_plan_legal_layouts(
    rival: type[Even] | type[Eplb] | type[FlexMoE], shape: tuple[int, int, int]
) -> None:
    num_ranks, num_experts, capacity = shape
    geometry = Geometry(num_ranks, num_experts, capacity, num_ranks)
    planner: Planner = rival(geometry)
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    for seed in range(5):
        counts_NE = np.random.default_rng(seed).integers(0, 9, (num_ranks, num_experts)) ** 3
        geometry.check_layout(planner.plan(counts_NE * (seed > 0), static))


def test_replicas_that_share_evenly_carry_every_token() -> None:
    layout = ExpertLayout.random(8, 3, 10, seed=(1,))
    counts_NE = np.random.default_rng(0).integers(0, 100, (8, 10))
    loads_N, off_node_tokens = split_among_all(counts_NE, layout, 4)
    assert loads_N.sum() == counts_NE.sum()
    assert 0 < off_node_tokens < counts_NE.sum()
    assert split_among_all(counts_NE, layout, 8)[1] == 0


def test_planning_rivals_beat_equal_replicas_on_a_skewed_load() -> None:
    geometry = Geometry(16, 32, 4, 8)
    share_E = 1.0 / np.arange(1, 33) ** 1.2
    counts_NE = np.random.default_rng(0).multinomial(4096, share_E / share_E.sum(), size=16)
    static = ExpertLayout.static(16, 4, 32)
    even = split_evenly(counts_NE, Even(geometry).plan(counts_NE, static), 8)
    flexmoe = split_evenly(counts_NE, FlexMoE(geometry).plan(counts_NE, static), 8)
    eplb = split_like_eplb(counts_NE, Eplb(geometry).plan(counts_NE, static), 8)
    assert eplb.ratio < 1.2 < even.ratio
    assert flexmoe.ratio < even.ratio
