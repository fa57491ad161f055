"""The named workloads: what each of them is, and how well it is balanced, with a reason each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.splits import split_exactly
from benchmarks.workloads import WORKLOADS, microbatches
from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy

# N, E, C on nodes of 8: scarce slots, the paper's dead spot, plenty, and more ranks than experts.
SHAPES = ((16, 32, 3), (16, 32, 4), (16, 32, 6), (32, 8, 2))

# Mean of max/mean with a layout one microbatch old, by shape. Seeds 1 to 6 stay a little below;
# the test takes others, which no choice in the planner was made on either.
MICROBATCH_OLD_BOUNDS = {
    # Only the noise of drawing 4096 tokens per rank.
    "balanced": (1.02, 1.001, 1.001, 1.01),
    # Experts change by up to 22 % from one microbatch to the next. With two spare slots per rank
    # all of it flows off; with one, ranks full of hot replicas have no neighbour to pass it on to.
    "hot expert set": (1.03, 1.001, 1.001, 1.001),
    "hot rank": (1.02, 1.002, 1.001, 1.001),
    "spread hot experts": (1.03, 1.01, 1.001, 1.03),
    # The mean load itself changes with the number of tokens; only proportions matter.
    "source ragged": (1.02, 1.001, 1.001, 1.001),
    # A rank without tokens computes as many as any other; experts without any do no harm.
    "zero-expert rank": (1.03, 1.001, 1.001, 1.02),
    # In each step an expert goes from 0.2 to 3.3 fair shares (N = 32, E = 8: 1.8 to 7.1). With one
    # replica, one rank carries it all; with two at C = 6 half each, with four a quarter.
    "rotating hotspot": (3.7, 3.6, 1.8, 1.85),
    # Every fourth step an expert goes from 0.5 to 10.8 fair shares (N = 32: 4 to 22), on one
    # replica or two at first. The mean is over all steps.
    "burst": (3.7, 2.4, 2.4, 2.4),
}

# Largest share of tokens that leave their node with a layout for the very counts. With C = 6 a node
# holds all experts; what leaves is what a node has too many of, and so in the last column.
OFF_NODE_BOUNDS = {
    # Half of the tokens are at the wrong node of two if every expert has one home, less what C - 2
    # spare slots per rank bring home.
    "balanced": (0.45, 0.24, 0.0, 0.0),
    # Hot experts are on all ranks; only the cold ones' tokens leave.
    "hot expert set": (0.20, 0.09, 0.0, 0.0),
    "hot rank": (0.28, 0.13, 0.0, 0.0),
    "spread hot experts": (0.22, 0.11, 0.0, 0.0),
    # One node may have half as many tokens again as the other: a fifth must leave.
    "source ragged": (0.33, 0.30, 0.24, 0.16),
    # One rank without tokens is a sixteenth of all, half of which the other node brings.
    "zero-expert rank": (0.36, 0.28, 0.034, 0.026),
    "rotating hotspot": (0.24, 0.11, 0.0, 0.0),
    "burst": (0.45, 0.24, 0.0, 0.0),
}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_layouts_balance_perfectly_within_their_bound_off_node(
    name: str, shape: tuple[int, int, int]
) -> None:
    geometry, static = problem(shape)
    for counts_NE in microbatches(name, geometry, 8, seed=11):
        layout = construct_layout(counts_NE, static, geometry.node_size)
        outcome = split_exactly(counts_NE, layout, geometry.node_size)
        assert not outcome.violation
        assert outcome.off_node_share <= OFF_NODE_BOUNDS[name][SHAPES.index(shape)]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_one_microbatch_old_stay_within_their_bound(
    name: str, shape: tuple[int, int, int]
) -> None:
    geometry, static = problem(shape)
    greedy = GreedyStrategy(geometry)
    ratios = [
        split_exactly(now_NE, greedy.plan(before_NE, static), geometry.node_size).ratio
        for before_NE, now_NE in pairwise(microbatches(name, geometry, 9, seed=12))
    ]
    assert np.mean(ratios) <= MICROBATCH_OLD_BOUNDS[name][SHAPES.index(shape)]


def test_every_workload_has_its_bounds() -> None:
    assert set(MICROBATCH_OLD_BOUNDS) == set(OFF_NODE_BOUNDS) == set(WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_repeatable_and_differ_by_seed_and_step(name: str) -> None:
    geometry, _ = problem((16, 32, 3))
    first = list(microbatches(name, geometry, 4, seed=0))
    again = list(microbatches(name, geometry, 4, seed=0))
    other = list(microbatches(name, geometry, 4, seed=1))
    for step, counts_NE in enumerate(first):
        assert counts_NE.shape == (16, 32)
        assert counts_NE.min() >= 0
        assert (counts_NE == again[step]).all()
        assert (counts_NE != other[step]).any()
    assert all((before_NE != now_NE).any() for before_NE, now_NE in pairwise(first))


def test_workloads_are_what_their_names_say() -> None:
    balanced = loads("balanced")
    assert balanced.max() < 1.1 * balanced.mean()

    # Four experts of 32 are hot.
    assert (np.sort(loads("hot expert set"))[::-1][:4] > 4 * 128 * 16).all()
    # Stock placement puts experts 0 and 1 on rank 0.
    assert set(np.argsort(loads("hot rank"))[-2:]) == {0, 1}
    assert set(np.argsort(loads("spread hot experts"))[-4:]) == {0, 8, 16, 24}

    ragged_N = counts("source ragged").sum(axis=1)
    assert ragged_N.max() > 2 * ragged_N.min()

    zero_NE = counts("zero-expert rank")
    assert zero_NE[:, :2].sum() == 0
    assert zero_NE[-1].sum() == 0
    assert (zero_NE[:-1].sum(axis=1) > 0).all()

    hottest = [int(loads("rotating hotspot", step).argmax()) for step in range(4)]
    assert len(set(hottest)) == 4

    largest = [loads("burst", step).max() for step in range(4)]
    assert largest[3] > 8 * max(largest[:3])


def test_unknown_workloads_are_quoted() -> None:
    with pytest.raises(ValueError, match="unknown workload 'x'; use one of balanced, "):
        next(microbatches("x", Geometry(2, 2, 1, 2), 1, seed=0))


def problem(shape: tuple[int, int, int]) -> tuple[Geometry, ExpertLayout]:
    num_ranks, num_experts, capacity = shape
    geometry = Geometry(num_ranks, num_experts, capacity, 8)
    return geometry, ExpertLayout.static(num_ranks, capacity, num_experts)


def counts(name: str, step: int = 0) -> Int64:
    geometry, _ = problem((16, 32, 3))
    return list(microbatches(name, geometry, step + 1, seed=0))[step]


def loads(name: str, step: int = 0) -> Int64:
    loads_E: Int64 = counts(name, step).sum(axis=0)
    return loads_E
