"""Sums over a step's passes of a layer, by the names of recordings."""

from __future__ import annotations

import math

import pytest

from megatron_laer.planner.balance import fsep_tokens_N, stock_tokens_N
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.prediction import predict
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS
from megatron_laer.telemetry.statistics import LayerPasses, Sample, predicted_values
from tests.recorded_runs import GEOMETRY, GUARD, counts_NE

RANKS = GEOMETRY.num_ranks


def test_passes_add_up_and_what_was_weighed_is_averaged() -> None:
    planned = ExpertLayout.static(RANKS, GEOMETRY.capacity, GEOMETRY.num_experts)
    counts = [counts_NE(0, 0, microbatch) for microbatch in range(3)]
    counts[1] //= 8
    decisions = [GUARD.decide(of_one, planned) for of_one in counts]
    assert [decision.replanned for decision in decisions] == [True, False, True]
    passes = LayerPasses.of(RANKS)
    for decision in decisions:
        passes.add(Sample(decision))

    tokens = [fsep_tokens_N(decision.quotas) for decision in decisions]
    assert passes.rank_tokens_N.tolist() == sum(tokens).tolist()
    largest = max(tokens, key=max)
    assert passes.values() == {
        "passes": 3,
        "fresh": 2,
        "changed_slots": decisions[0].changed_slots + decisions[2].changed_slots,
        "largest_tokens": max(largest),
        "least_tokens": -(-sum(largest) // RANKS),
        "max_over_mean": pytest.approx(_mean([RANKS * max(of) / sum(of) for of in tokens])),
        "stock_max_over_mean": pytest.approx(
            _mean([RANKS * max(stock_tokens_N(of)) / of.sum() for of in counts])
        ),
        "gain_ms": pytest.approx(_mean([1e3 * of.gain_s for of in decisions])),
        "cost_ms": pytest.approx(_mean([1e3 * of.cost_s for of in decisions])),
    }


def test_predictions_are_averaged_and_nothing_is_no_number() -> None:
    planned = ExpertLayout.static(RANKS, GEOMETRY.capacity, GEOMETRY.num_experts)
    found = [predict(GUARD, GUARD.decide(counts_NE(0, 0, of), planned)) for of in range(2)]
    assert predicted_values(found) == {
        "predicted_ms": pytest.approx(_mean([1e3 * of.layer_s for of in found])),
        "stock_ms": pytest.approx(_mean([1e3 * of.stock_s for of in found])),
        "balanced_ms": pytest.approx(_mean([1e3 * of.balanced_s for of in found])),
        "bound_ms": pytest.approx(_mean([1e3 * of.bound_s for of in found])),
    }
    values = LayerPasses.of(RANKS).values() | predicted_values([])
    assert all(value == 0 or math.isnan(value) for value in values.values())
    assert set(values) <= {*RECORDED_OF_LAYERS}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
