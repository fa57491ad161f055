"""Memory of a simulated iteration, and replicas: held over a step, and in fp8."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_laer.choices import Recompute, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.precision import Precision
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import (
    FSEP,
    METHODS,
    STOCK,
    MethodSettings,
    fsep,
)
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.predict import predict_iterations
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.replay import LayerPolicy, Routing
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_trace
from tests.tools.plan_cases import drifting_trace
from tests.tools.test_iteration_work import H100, TINY, predicted


def test_experts_that_are_held_take_memory_of_all_layers_and_one_exchange_a_step():
    trace = drifting_trace()
    by_layer, by_step = (
        predicted(trace, names=[FSEP], mode="forecast", restore=restore)[FSEP]
        for restore in ("layer", "step")
    )
    # All four layers' experts, and their gradient sums in four bytes.
    layer = 3 * TINY.expert_weights
    held, passing = by_step.memory_bytes, by_layer.memory_bytes
    assert held["restored_experts"] == 2 * passing["restored_experts"] == 4 * layer * 2
    assert held["restored_gradients"] == layer * 2 + 4 * layer * 4
    assert by_step.exposed_s["restore"] < by_layer.exposed_s["restore"] / 4
    assert 0 < by_step.exposed_s["reduce"] < by_layer.exposed_s["reduce"]


def test_sums_of_a_held_step_are_sent_in_four_bytes():
    costs = CostModel(H100, TINY.hidden, TINY.expert_ffn, True, 2)
    of_layer, of_step = (
        fsep(
            MethodSettings(Geometry(4, 8, 4, 2), costs, config=FSEPConfig(restore=restore)),
            Rates(H100, 2),
        )
        .layer_planner()
        .exchanges[1]
        for restore in ("layer", "step")
    )
    assert of_step.intra_bytes == 2 * of_layer.intra_bytes > 0


def test_replicas_that_are_held_take_memory_of_their_slots():
    trace = workload_trace("W1", WorkloadShape(8, 8, 2, 2**17), 4)  # enough tokens for replicas
    homes = {"names": [FSEP], "mode": "forecast", "sharding": Sharding.EXPERTS}
    memory = predicted(trace, **homes, restore="step")[FSEP].memory_bytes
    replica_slots = 3 - trace.num_experts // trace.num_ranks
    slots = 4 * replica_slots * TINY.expert_weights
    assert memory["restored_experts"] == slots * 2
    assert memory["restored_gradients"] == slots * 4 + slots / 4 * 2


def test_weights_and_optimizer_take_the_documented_memory():
    """On 32 ranks in groups of 8 whose experts' optimizer state four ranks share."""
    model = read_model("mixtral-8x7b-e8k2")
    costs = CostModel(H100, model.hidden, model.expert_ffn, True, 2)
    run = RunShape(8, 8, 4096, 1, replicas=4)
    experts = len(model.layer_has_experts) * model.expert_weights  # one of each layer on a rank
    for name in (FSEP, STOCK):
        settings = MethodSettings(Geometry(8, 8, 2, 8, Sharding.EXPERTS), costs, stock_group=8)
        parts = memory_bytes(model, run, METHODS[name](settings, Rates(H100, 2)), 8192)
        found = sum(parts[part] for part in ("weights", "gradients", "optimizer"))
        whole = 2 + 4 + 12 / 4  # bytes of an expert's weight, gradient and quarter of its state
        assert found - experts * whole == pytest.approx(10.2e9, rel=0.03)


def test_rows_that_wait_for_backward_are_the_mean_of_a_ranks_layers():
    """The busiest rank of stock is the same in both layers, or another in each."""
    alike, others = (balanced_but_for(*hot, ranks=4, experts=8) for hot in ((0, 0), (0, 2)))
    same, apart = (predicted(trace, names=[STOCK])[STOCK] for trace in (alike, others))
    assert same.max_over_mean == apart.max_over_mean == 2.5
    parts = same.memory_bytes["activations"], apart.memory_bytes["activations"]
    # All four layers of the model stay, with rows of 2.5 times the mean, or with 0.5 in two.
    kept_bytes = 4 * (2 * TINY.hidden + 3 * TINY.expert_ffn) * 2
    assert parts[0] - parts[1] == (2.5 - 1.5) * 1600 * kept_bytes


def balanced_but_for(*hot, ranks, experts):
    """Return a trace whose layers have half of their tokens on one rank of stock each."""
    counts_LE = np.full((len(hot), experts), 100)
    for counts_E, rank in zip(counts_LE, hot, strict=True):
        counts_E[2 * rank : 2 * rank + 2] = 500
    step_R, layer_R = (axis.reshape(-1) for axis in np.indices((3, len(hot)), dtype=np.int64))
    counts_RNE = np.tile(counts_LE[:, None], (3, ranks, 1)).astype(np.int32)
    return Trace(tuple("ab"), step_R, layer_R, np.zeros_like(step_R), counts_RNE)


HOMES = Geometry(8, 8, 3, 8, Sharding.EXPERTS)


def of_layout(model, recompute=Recompute.NONE, **settings):
    """Predict a step of four microbatches with one layout of replicas, and its restores' seconds.

    Ranks have equal loads, so that none waits.
    """
    rates = Rates(H100, 2, precision=model.precision)
    layout = HOMES.random_layout((1,))
    policy = LayerPolicy(SimpleNamespace(plan=lambda counts_NE, current: layout), layout)
    costs = CostModel(
        H100, model.hidden, model.expert_ffn, True, 2, recompute, precision=model.precision
    )
    settings = MethodSettings(HOMES, costs, FSEPConfig(plan_mode="forecast", **settings))

    def planned(method):
        make = method.layer_planner
        return replace(method, layer_planner=lambda: replace(make(), policy=policy))

    method = planned(fsep(settings, rates))
    trace = workload_trace("W0", WorkloadShape(8, 8, 2, 4096), 4)
    run = RunShape(8, 8, 64, 4, recompute=recompute)
    (found,) = predict_iterations(Routing(trace, 8, 2), model, run, [method], [rates])
    restore, _ = method.layer_planner()._exchanges(layout)
    return found, restore.seconds(rates)


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_mxfp8_restores_a_form_for_each_direction(recompute, holds, overlaps):
    """Waits and memory of replicas, compared with those of a recipe with one form."""
    settings = {"scheduler": "on" if overlaps else "off", "restore": "step" if holds else "layer"}
    (one, one_s), (two, two_s) = (
        of_layout(replace(TINY, precision=recipe), recompute, **settings)
        for recipe in (Precision.BLOCKWISE, Precision.MXFP8)
    )
    larger = 1 + 1 / 32  # a scale for 32 weights
    # Restores of a layer in a step.
    times, of_two = (1, 2) if holds else (8, 8 if recompute == Recompute.NONE else 12)
    held = [of.memory_bytes["restored_experts"] for of in (one, two)]
    assert held[1] / held[0] == pytest.approx((2 if holds else 1) * larger, rel=1e-3)
    waited_s = [of.exposed_s["restore"] for of in (one, two)]
    if not overlaps:  # a rank also waits for the last one to begin
        assert waited_s == pytest.approx([4 * times * one_s, 4 * of_two * two_s], rel=0.03)
    elif holds and recompute != Recompute.FULL:
        # Nothing hides what is fetched for a layer's first backward.
        assert waited_s[1] - waited_s[0] > 4 * two_s * H100.contention.exchange
