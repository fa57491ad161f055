"""Forecasts weigh observations and can be saved."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_laer.planner.forecast import SmoothedForecast, WindowForecast

FIRST_NE = np.array([[8, 0], [4, 4]])
SECOND_NE = np.array([[0, 8], [4, 8]])


def test_the_newest_counts_weigh_three_quarters_or_one() -> None:
    first = SmoothedForecast().observe(FIRST_NE)
    assert (first.counts_NE() == 16 * FIRST_NE).all()
    for forecast in (first, SmoothedForecast(first.kept, first.errors)):  # saved between
        for mean_NE, weight in zip(forecast.observe(SECOND_NE).kept, (0.75, 0.25), strict=True):
            assert (mean_NE == 16 * (FIRST_NE + weight * (SECOND_NE - FIRST_NE))).all()


def test_observing_changes_no_earlier_state_and_no_input() -> None:
    counts_NE = FIRST_NE.copy()
    for start in (SmoothedForecast(), WindowForecast()):
        state = start.observe(counts_NE)
        before_NE = state.counts_NE().copy()
        state.observe(SECOND_NE)
        counts_NE += 1
        assert (state.counts_NE() == before_NE).all()
        with pytest.raises(ValueError, match="read-only"):
            state.counts_NE()[0, 0] = 1


def test_a_window_is_the_sum_of_the_newest_microbatches() -> None:
    counts_MNE = np.random.default_rng(0).integers(0, 100, (9, 3, 4))
    state = WindowForecast()
    for begin, end in ((0, 1), (1, 3), (3, 9)):
        state = state.observe(counts_MNE[begin:end])
        assert (state.counts_NE() == counts_MNE[max(0, end - 5) : end].sum(axis=0)).all()
    assert (state.observe(counts_MNE[0]).kept[-1] == counts_MNE[0]).all()
    assert (state.changed(lambda kept_NE: 2 * kept_NE).counts_NE() == 2 * state.counts_NE()).all()


def test_wrong_arguments_are_quoted() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\), observed before were \(2, 2\)"):
        SmoothedForecast().observe(FIRST_NE).observe(FIRST_NE[:1])
    for empty in (SmoothedForecast(), WindowForecast()):
        with pytest.raises(ValueError, match="nothing was observed yet"):
            empty.counts_NE()


def test_the_mean_that_did_best_lately_is_the_forecast() -> None:
    rng = np.random.default_rng(3)
    first_E, second_E = rng.dirichlet(np.ones(16), size=2)
    forecast = SmoothedForecast()
    # Steps of one kind differ by chance alone: the longer memory is nearer.
    for _ in range(20):
        forecast = forecast.observe(rng.multinomial(200, first_E, size=8))
    assert forecast.counts_NE() is forecast.kept[1]
    # Where loads drift the shorter one is nearer.
    for part in np.linspace(0, 1, 8):
        counts_NE = rng.multinomial(200, (1 - part) * first_E + part * second_E, size=8)
        forecast = forecast.observe(counts_NE)
    assert forecast.counts_NE() is forecast.kept[0] and forecast.errors[0] < forecast.errors[1]
    # The longer one is nearer again once only chance differs.
    for _ in range(20):
        forecast = forecast.observe(rng.multinomial(200, second_E, size=8))
    assert forecast.counts_NE() is forecast.kept[1]


def test_both_means_start_anew_at_a_jump() -> None:
    rng = np.random.default_rng(4)
    forecast, texts = SmoothedForecast(), rng.dirichlet(np.ones(16), size=3)
    for share_E in texts:
        for step in range(10):
            counts_NE = rng.multinomial(200, share_E, size=8)
            forecast = forecast.observe(counts_NE)
            is_newest = (forecast.counts_NE() == 16 * counts_NE).all()
            assert is_newest == (step == 0), "at the first step of a text, and at no other"


def test_a_jump_is_further_than_twice_the_errors_of_both_means_which_it_keeps() -> None:
    means = 2 * (16 * FIRST_NE,)
    missed = 16 * 20
    # Errors add up to four times the usual one, and a jump is further than twice that.
    errors = 1, 2 * missed - 1
    jumped = SmoothedForecast(means, errors).observe(SECOND_NE)
    assert (jumped.counts_NE() == 16 * SECOND_NE).all() and jumped.errors == errors
    drifted = SmoothedForecast(means, (1, 2 * missed)).observe(SECOND_NE)
    assert (drifted.counts_NE() != 16 * SECOND_NE).any()
