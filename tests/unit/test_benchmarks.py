"""The convergence benchmark notices runs unlike stock; routing is skewed and read as stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import trace_cases
from benchmarks.convergence_results import checks
from benchmarks.convergence_runs import AUX_LOSSES, FSEP, NO_AUX, POINTS, STOCK, WAYS, Run
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
from benchmarks.splits import split_exactly
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.planner.layout import ExpertLayout

STEPS = 10 * POINTS
SKEWED = [700, 200, 75, 25]
EVEN = [260, 250, 250, 240]

Runs = dict[tuple[str, str], Run]


def alike() -> Runs:
    """Make good runs: FSEP is as far from stock as stock with other roundings is."""
    rng = np.random.default_rng(0)
    curve = 2 + np.exp(-np.arange(STEPS) / 20)
    runs = {}
    for way in WAYS:
        for aux in AUX_LOSSES:
            moved = 0 if way == STOCK else rng.permutation([2, -2, 0, 0])
            losses = curve + (0 if way == STOCK else rng.normal(scale=0.01, size=STEPS))
            tokens_E = np.array(SKEWED if aux == NO_AUX else EVEN)
            placed = [1.01] if way == FSEP else [1.8]
            runs[way, aux] = Run(
                losses=losses.tolist(),
                max_over_mean=placed * STEPS,
                stock_max_over_mean=[1.8] * STEPS,
                validation=losses[:: STEPS // POINTS].tolist(),
                expert_tokens=[[(tokens_E + moved).tolist()] * 2] * POINTS,
                layouts=STEPS - 1 if way == FSEP else 0,
                fresh_layouts=0.1 if way == FSEP else 0.0,
                wall_s=60.0,
            )
    return runs


def missed(runs: Runs) -> list[str]:
    return [check.sentence for check in checks(runs) if not check.holds]


def _shifted(values: list[float]) -> list[float]:
    return [value + 0.1 for value in values]


@pytest.mark.parametrize(
    "what, change",
    [
        ("training", lambda run: replace(run, losses=_shifted(run.losses))),
        ("validation", lambda run: replace(run, validation=_shifted(run.validation))),
        ("experts", lambda run: replace(run, expert_tokens=[[[250, 250, 250, 250]] * 2] * POINTS)),
        ("layouts", lambda run: replace(run, layouts=0)),
        ("over ranks", lambda run: replace(run, max_over_mean=[1.1] * STEPS)),
    ],
)
def test_fsep_that_is_further_from_stock_is_told(what: str, change: Callable[[Run], Run]) -> None:
    runs = alike()
    assert missed(runs) == []
    runs[FSEP, NO_AUX] = change(runs[FSEP, NO_AUX])
    found = missed(runs)
    assert found and all(what in sentence or "auxiliary" in sentence for sentence in found)


TRACED = BURST_EVERY + 2
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
    skews = skews_of(drifting_trace(shape, TRACED, seed), shape)
    assert (skews >= LEAST_SKEW).all() and (skews <= MOST_SKEW).all()
    trace = drifting_trace(SHAPE, TRACED, seed=0)
    for step in range(1, TRACED):
        for layer in range(SHAPE.layers):
            before_E = counts_NE(trace, step - 1, layer).sum(axis=0)
            now_E = counts_NE(trace, step, layer).sum(axis=0)
            # More than noise: two draws from one popularity differ by about 1.4 √count.
            assert (np.abs(now_E - before_E) > 4 * np.sqrt(before_E + 1)).any()


def test_a_burst_trace_is_even_but_at_bursts() -> None:
    skews = skews_of(burst_trace(SHAPE, TRACED, seed=0))
    for step in range(TRACED):
        if is_burst(step):
            assert (skews[step] >= LEAST_SKEW).all() and (skews[step] <= MOST_SKEW).all()
        else:
            assert (skews[step] < 1.05).all()
    assert sum(is_burst(step) for step in range(TRACED)) == 1


def test_a_trace_gives_only_what_was_known_before_the_case(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 9, (3, 2, 4, 2, 5)).astype(np.int16)
    np.savez(tmp_path / "trace.npz", tokens=tokens)
    trace = trace_cases.Trace(tmp_path / "trace.npz")
    every = trace.cases(1, 0)
    assert len(every) == 2 * 2 * 2
    assert trace.cases(3, 1) == every[1::3]
    first = trace_cases.Case(1, 1, 0)
    assert (trace.now(first) == tokens[1, 1, :, 0]).all()
    # Only iteration 0 precedes it; a forecast from one observation is that observation.
    assert (trace.forecast(first) == 16 * tokens[0, 1].astype(np.int64).sum(axis=1)).all()
    assert trace.before(first) is None
    before_NE = trace.before(trace_cases.Case(1, 1, 1))
    assert before_NE is not None
    assert (before_NE == tokens[1, 1, :, 0]).all()


def test_a_violation_is_any_token_above_the_bound() -> None:
    layout = ExpertLayout.from_slots(2, 1, 2, [0, 1])
    assert not split_exactly(np.array([[3, 2], [0, 0]]), layout, 2).violation
    assert split_exactly(np.array([[4, 1], [0, 0]]), layout, 2).violation
