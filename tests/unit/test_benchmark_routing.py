"""Routing that the end-to-end benchmark imposes has the stated skew."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.routing import (
    BURST_EVERY,
    LEAST_SKEW,
    MOST_SKEW,
    RoutingShape,
    Trace,
    burst_trace,
    drifting_trace,
    is_burst,
)
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N

STEPS = BURST_EVERY + 2
SHAPE = RoutingShape(layers=2, ranks=2, experts=8, tokens=2048, topk=2)


def counts_NE(trace: Trace, step: int, layer: int, shape: RoutingShape = SHAPE) -> np.ndarray:
    counts = [np.bincount(chosen.ravel(), minlength=shape.experts) for chosen in trace[step, layer]]
    return np.stack(counts).astype(np.int64)


def skews_of(trace: Trace, shape: RoutingShape = SHAPE) -> np.ndarray:
    def skew(step: int, layer: int) -> float:
        return max_over_mean(stock_tokens_N(counts_NE(trace, step, layer, shape)))

    layers = range(shape.layers)
    return np.array([[skew(step, layer) for layer in layers] for step in range(len(trace))])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_drifting_trace_is_skewed_and_has_new_counts_at_each_step(seed: int, ranks: int) -> None:
    shape = RoutingShape(2, ranks, 8, 2048, 2)
    skews = skews_of(drifting_trace(shape, STEPS, seed), shape)
    assert (skews >= LEAST_SKEW).all() and (skews <= MOST_SKEW).all()
    trace = drifting_trace(SHAPE, STEPS, seed=0)
    for step in range(1, STEPS):
        for layer in range(SHAPE.layers):
            before_E = counts_NE(trace, step - 1, layer).sum(axis=0)
            now_E = counts_NE(trace, step, layer).sum(axis=0)
            # More than noise: two draws from one popularity differ by about 1.4 √count.
            assert (np.abs(now_E - before_E) > 4 * np.sqrt(before_E + 1)).any()


def test_a_burst_trace_is_even_but_at_bursts() -> None:
    skews = skews_of(burst_trace(SHAPE, STEPS, seed=0))
    for step in range(STEPS):
        if is_burst(step):
            assert (skews[step] >= LEAST_SKEW).all() and (skews[step] <= MOST_SKEW).all()
        else:
            assert (skews[step] < 1.05).all()
    assert sum(is_burst(step) for step in range(STEPS)) == 1


def test_a_token_goes_to_different_experts_and_traces_depend_on_the_seed_alone() -> None:
    for trace in (drifting_trace(SHAPE, 2, seed=0), burst_trace(SHAPE, 2, seed=0)):
        assert trace.max() < SHAPE.experts
        assert (trace[..., 0] != trace[..., 1]).all()
    first, again, other = (drifting_trace(SHAPE, 3, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
