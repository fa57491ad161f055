"""The workloads W0 to W7: their definitions, and reasons for how well each is balanced."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.costs import paper_costs
from benchmarks.flexmoe import FlexMoEStrategy
from benchmarks.splits import split_evenly, split_exactly
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.forecast import WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.static import StaticStrategy
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.tools.traces.workloads import (
    NATURAL,
    PAPER,
    PAPER_FIRST,
    TITLES,
    WORKLOADS,
    WorkloadShape,
    experts_of_tokens,
    workload_counts,
    workload_trace,
)

# N, E, C on nodes of 8: scarce slots, the paper's dead spot, plenty, and more ranks than experts.
SHAPES = ((16, 32, 3), (16, 32, 4), (16, 32, 6), (32, 8, 2))
TOKENS, TOPK = 2048, 2

# Mean max/mean with a layout one microbatch old. Where counts change by sampling noise alone,
# almost all of it flows off. In a third of W6's steps experts go from 0.25 to 3.25 fair shares on
# one replica each, in a fourth of W7's from 1 to 2.5.
MICROBATCH_OLD_BOUNDS = {"W0": 1.0, "W6": 1.65, "W7": 1.40}
NOISE = 1.03


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_layouts_balance_and_old_ones_nearly(name, shape):
    """Seed 12 influenced no choice in the planner."""
    num_ranks, num_experts, capacity = shape
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    sizes = WorkloadShape(num_ranks, num_experts, TOPK, TOKENS)
    greedy = GreedyStrategy(Geometry(num_ranks, num_experts, capacity, 8))
    ratios = []
    for before_NE, now_NE in pairwise(workload_counts(name, sizes, s, 12) for s in range(9)):
        assert not split_exactly(now_NE, construct_layout(now_NE, static, 8), 8).violation
        ratios.append(split_exactly(now_NE, greedy.plan(before_NE, static), 8).ratio)
    assert np.mean(ratios) <= MICROBATCH_OLD_BOUNDS.get(name, NOISE)


@pytest.mark.parametrize("name", TITLES)
def test_a_workload_follows_from_its_name_seed_and_step_alone(name):
    shape = WorkloadShape(4, 16, 2, 256)
    counts_NE = workload_counts(name, shape, 5, seed=3)
    assert (counts_NE == workload_counts(name, shape, 5, seed=3)).all()
    for other_NE in (workload_counts(name, shape, 6, 3), workload_counts(name, shape, 5, 4)):
        assert (counts_NE == other_NE).all() == (name == "W0")
    trace = workload_trace(name, shape, 7, seed=3)
    assert trace.step_R.tolist() == list(range(7))
    assert (trace.counts_NE(5) == counts_NE).all()


@pytest.mark.parametrize("name", TITLES)
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_tokens_have_k_different_experts(name, topk):
    shape = WorkloadShape(4, 8, topk, 100)
    for counts_E in workload_counts(name, shape, 3):
        tokens = int(counts_E.sum()) // topk
        assert tokens == 100 or name == "W4"
        chosen_TK = experts_of_tokens(counts_E, topk)
        assert chosen_TK.shape == (tokens, topk)
        assert all(len(set(experts)) == topk for experts in chosen_TK.tolist())
        assert (np.bincount(chosen_TK.ravel(), minlength=8) == counts_E).all()


def test_a_workload_without_enough_experts_for_top_k_is_refused():
    with pytest.raises(ValueError, match="W5 routes to 4 of 8 experts, too few for a top-k of 5"):
        workload_counts("W5", WorkloadShape(2, 8, 5, 8), 0)


def test_w0_is_even():
    assert (workload_counts("W0", WorkloadShape(4, 8, 2, 400), 0) == 100).all()


# With 4 of 16 experts hot and three of K = 4 tokens on them, a hot one has 13/16 · 4 = 3.25 fair
# shares. A cold one has a quarter.
@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W6"])
def test_a_quarter_of_the_experts_is_hot(name):
    shares_E = shares(name)
    assert np.allclose(np.sort(shares_E), [0.25] * 12 + [3.25] * 4, rtol=0.1)


def test_workloads_are_uneven_as_they_are_described():
    assert hot("W2") == [0, 1, 2, 3]
    assert hot("W3") == [0, 4, 8, 12]
    assert len({tuple(hot("W1", seed=seed)) for seed in range(5)}) == 5
    # W4 is uneven at the sources alone.
    tokens_N = workload_counts("W4", WorkloadShape(16, 16, 2, 4000), 0).sum(axis=1) // 2
    assert 500 <= tokens_N.min() < 2000 < 5000 < tokens_N.max() <= 8000
    assert np.allclose(shares("W4"), 1.0, rtol=0.1)
    # Half of the experts of W5 have no tokens.
    assert np.allclose(shares("W5"), [0.0] * 8 + [2.0] * 8, rtol=0.1, atol=0)
    # W6 moves on every third step, and every fourth step of W7 is a burst.
    firsts = [hot("W6", step)[0] for step in range(15)]
    assert firsts == [first for first in (0, 4, 8, 12, 0) for _ in range(3)]
    largest = [shares("W7", step).max() for step in range(8)]
    assert np.allclose(largest, [1, 1, 1, 2.5] * 2, rtol=0.1)
    assert hot("W7", 3) == [0, 1, 2, 3]


def shares(name: str, step: int = 0, seed: int = 0) -> np.ndarray:
    loads_E = workload_counts(name, WorkloadShape(16, 16, 2, 4000), step, seed).sum(axis=0)
    found: np.ndarray = loads_E / loads_E.mean()
    return found


def hot(name: str, step: int = 0, seed: int = 0) -> list[int]:
    found: list[int] = np.flatnonzero(shares(name, step, seed) > 2).tolist()
    return found


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (60, 4), (128, 8), (256, 8)])
def test_natural_routing_has_the_skew_of_runs_and_drifts(experts, topk):
    """Groups of any number have the skew of runs."""
    shape = WorkloadShape(8, experts, topk, 4096)
    turned = []
    for seed in range(4):
        loads = [workload_counts(NATURAL, shape, step, seed).sum(axis=0) for step in (0, 1, 50)]
        for number, least, most in ((8, 1.3, 1.7), (32, 1.7, 2.0), (64, 1.9, 2.3)):
            if number == 8 or experts % number == 0:
                groups = np.array([part.sum() for part in np.array_split(loads[0], number)])
                assert least <= groups.max() / groups.mean() <= most
        turned.append([np.corrcoef(loads[0], later)[0, 1] for later in loads[1:]])
    next_step, much_later = np.mean(turned, axis=0)
    assert next_step > 0.98 and much_later < 0.9


@pytest.mark.parametrize(
    ("name", "experts", "topk", "deviation", "between_nodes", "correlation"),
    [
        (PAPER_FIRST, 8, 2, 0.38, 0.0277, 0.86),
        (PAPER_FIRST, 16, 4, 0.38, 0.0240, 0.9),
        (PAPER, 16, 4, 0.63, 0.0106, 0.90),
    ],
)
def test_the_papers_routing_has_its_published_skew_and_drift(
    name, experts, topk, deviation, between_nodes, correlation
):
    """Quarters of the experts, and nodes of 8 ranks, as in figure 10's tokens of FSDP+EP."""
    shape = WorkloadShape(32, experts, topk, 16384)
    shares = np.stack(
        [
            [workload_counts(name, shape, step, seed).reshape(4, 8, -1, 4) for step in range(10)]
            for seed in range(32 if experts == 8 else 24)  # the layers of Mixtral-8x7B
        ]
    ).sum(axis=(3, 4))  # [seeds, steps, nodes, quarters]: FSDP+EP has expert e on rank e mod 4
    share = shares / shares.sum(axis=3, keepdims=True)
    assert share.std(axis=2).mean() == pytest.approx(between_nodes, rel=0.1)
    off = share.mean(axis=2) - 0.25
    assert (off / 0.25).std() == pytest.approx(deviation, rel=0.1)
    before, after = off[:, :2], off[:, 8:]
    found = (before * after).sum() / np.sqrt((before**2).sum() * (after**2).sum())
    assert found == pytest.approx(correlation, abs=0.03)


@pytest.mark.parametrize(
    ("name", "experts", "topk", "published"),
    [(PAPER_FIRST, 8, 2, (1.66, 1.49, 1.39)), (PAPER, 16, 4, (1.88, 1.69, 1.17))],
)
def test_the_papers_planners_balance_its_routing_as_plotted(name, experts, topk, published):
    """Compare max/mean of FSDP+EP, FlexMoE and LAER, means of layers and microbatches."""
    geometry, found = Geometry(32, experts, topk, 8), []
    laer = make_strategy("laer", geometry=geometry, costs=paper_costs())
    planners = StaticStrategy(geometry), FlexMoEStrategy(geometry), laer
    for seed in range(0, 24, 2):
        forecast, planned = WindowForecast(), [geometry.static_layout] * 3
        for step in range(10):
            counts_NE = workload_counts(name, WorkloadShape(32, experts, topk, 16384), step, seed)
            if step >= 5:
                outcomes = [split_evenly(counts_NE, layout, 8) for layout in planned]
                found.append([outcome.ratio for outcome in outcomes])
            forecast = forecast.observe(counts_NE)
            expected_NE = forecast.counts_NE()
            planned = [
                planner.plan(expected_NE, layout)
                for planner, layout in zip(planners, planned, strict=True)
            ]
    assert np.mean(found, axis=0) == pytest.approx(published, rel=0.05)
