"""Replicas in a simulated iteration: held over a step, in fp8, and with layers in bf16."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_laer.choices import PlanMode, Recompute, Sharding
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.precision import Precision
from megatron_laer.tools.simulator.iteration.methods import FSEP, MethodSettings, make_method
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.predict import predict_iterations
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.replay import LayerPolicy
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_trace
from tests.tools.plan_cases import drifting_trace
from tests.tools.test_iteration_work import H100, MODEL, TINY, predicted


def test_experts_that_are_held_are_restored_and_reduced_once_per_step():
    trace = drifting_trace()
    by_layer, by_step = (
        predicted(trace, names=[FSEP], mode="forecast", holds_step=holds)[FSEP]
        for holds in (False, True)
    )
    # Two restores and one reduce in each of four microbatches, or one per step, of float32 sums.
    links, kinds = ("intra", "inter"), (("restore", 8), ("reduce", 4 / 2))
    for link, (kind, times) in itertools.product(links, kinds):
        passing, held = (of.bytes_by_kind[link][kind] for of in (by_layer, by_step))
        assert passing == pytest.approx(times * held)
    # All four layers' experts, and their gradient sums in four bytes.
    layer = 3 * TINY.expert_weights
    held, passing = by_step.memory_bytes, by_layer.memory_bytes
    assert held["restored_experts"] == 2 * passing["restored_experts"] == 4 * layer * 2
    assert held["restored_gradients"] == layer * 2 + 4 * layer * 4
    assert by_step.exposed_s["restore"] < by_layer.exposed_s["restore"] / 4
    assert 0 < by_step.exposed_s["reduce"] < by_layer.exposed_s["reduce"]


def test_replicas_that_are_held_move_once_per_step():
    trace = workload_trace("W1", WorkloadShape(8, 8, 2, 2**17), 4)  # enough tokens for replicas
    homes = {"names": [FSEP], "mode": "forecast", "sharding": Sharding.EXPERTS}
    by_layer, by_step = (
        predicted(trace, **homes, holds_step=holds)[FSEP] for holds in (False, True)
    )
    for kind, times in (("restore", 8), ("reduce", 4 / 2)):
        passing, held = (
            sum(of.bytes_by_kind[link][kind] for link in ("intra", "inter"))
            for of in (by_layer, by_step)
        )
        assert passing == pytest.approx(times * held) and held > 0
    replica_slots = 3 - trace.num_experts // trace.num_ranks
    slots = 4 * replica_slots * TINY.expert_weights
    assert by_step.memory_bytes["restored_experts"] == slots * 2
    assert by_step.memory_bytes["restored_gradients"] == slots * 4 + slots / 4 * 2


HOMES = Geometry(8, 8, 3, 8, Sharding.EXPERTS)


def test_steps_without_replicas_count_no_bytes_of_them():
    """On one node, as between nodes even loads have replicas too, for tokens that stay inside."""
    skewed, even = (workload_trace(name, WorkloadShape(8, 8, 2, 2**17), 4) for name in ("W1", "W0"))
    costs = CostModel(H100, TINY.hidden, TINY.expert_ffn, TINY.gated, 2)
    rates = Rates(H100, 2)
    method = make_method(FSEP, MethodSettings(HOMES, costs, PlanMode.FORECAST), rates)

    def restored(counts_RNE):
        routing = Routing(replace(even, counts_RNE=counts_RNE), 8)
        run = RunShape(8, 8, round(routing.pairs / TINY.topk), 4)
        (found,) = predict_iterations(routing, TINY, run, [method], [rates], steps=2)
        return found.bytes_by_kind["intra"]["restore"]

    # The second step's forecast is even, and the last one's skewed.
    mixed_RNE = np.concatenate([even.counts_RNE[:2], skewed.counts_RNE[2:]])
    never, once, always = map(restored, (even.counts_RNE, mixed_RNE, skewed.counts_RNE))
    assert 0 == never < once < always


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
    settings = MethodSettings(HOMES, costs, PlanMode.FORECAST, **settings)

    def planned(method):
        make = method.layer_planner
        return replace(method, layer_planner=lambda: replace(make(), policy=policy))

    method = planned(make_method(FSEP, settings, rates))
    if method.in_bf16 is not None:
        method = replace(method, in_bf16=planned(method.in_bf16))
    trace = workload_trace("W0", WorkloadShape(8, 8, 2, 4096), 4)
    run = RunShape(8, 8, 64, 4, recompute=recompute)
    (found,) = predict_iterations(Routing(trace, 8), model, run, [method], [rates])
    restore, _ = method.layer_planner()._exchanges(layout)
    return found, restore.seconds(rates)


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_mxfp8_restores_a_form_for_each_direction(recompute, holds, overlaps):
    """Bytes, waits and memory of replicas, compared with those of a recipe with one form."""
    settings = {"overlaps": overlaps, "holds_step": holds}
    (one, one_s), (two, two_s) = (
        of_layout(replace(TINY, precision=recipe), recompute, **settings)
        for recipe in (Precision.BLOCKWISE, Precision.MXFP8)
    )
    larger = 1 + 1 / 32  # a scale for 32 weights
    # Restores of a layer in a step.
    times, of_two = (1, 2) if holds else (8, 8 if recompute == Recompute.NONE else 12)
    moved, held = (
        [part(of) for of in (one, two)]
        for part in (
            lambda of: of.bytes_by_kind["intra"]["restore"],
            lambda of: of.memory_bytes["restored_experts"],
        )
    )
    assert moved[1] / moved[0] == pytest.approx(of_two / times * larger, rel=1e-3)
    assert held[1] / held[0] == pytest.approx((2 if holds else 1) * larger, rel=1e-3)
    waited_s = [of.exposed_s["restore"] for of in (one, two)]
    if not overlaps:  # a rank also waits for the last one to begin
        assert waited_s == pytest.approx([4 * times * one_s, 4 * of_two * two_s], rel=0.03)
    elif holds and recompute != Recompute.FULL:
        # Nothing hides what is fetched for a layer's first backward.
        assert waited_s[1] - waited_s[0] > 4 * two_s * H100.contention.exchange


@pytest.mark.parametrize("ends", [(1, 0), (0, 2), (1, 2)])
def test_layers_in_bf16_have_its_bytes_times_and_memory(ends):
    whole, none = (
        of_layout(replace(TINY, precision=one))[0]
        for one in (Precision.BLOCKWISE, Precision.PARAMETERS)
    )
    found, _ = of_layout(replace(TINY, precision=Precision.BLOCKWISE, bf16_ends=ends))
    share = sum(ends) / 4
    for part in (
        lambda of: of.bytes_by_kind["intra"]["restore"],
        lambda of: of.compute_s["experts"],
        lambda of: of.compute_s["attention"],
        lambda of: -of.memory_bytes.get("quantised_weights", 0),
    ):
        assert part(whole) < part(none)
        mixed = (1 - share) * part(whole) + share * part(none)
        assert part(found) == pytest.approx(mixed, rel=0.02)
    # Two layers at once, the largest.
    of_bf16, of_fp8 = (of.memory_bytes["restored_experts"] / 2 for of in (none, whole))
    larger = min(sum(ends), 2)
    expected = larger * of_bf16 + (2 - larger) * of_fp8
    assert found.memory_bytes["restored_experts"] == pytest.approx(expected)
    assert found.memory_bytes["workspaces"] == none.memory_bytes["workspaces"]
    assert found.memory_bytes["payloads"] == whole.memory_bytes["payloads"] > 0


def test_layers_of_multi_token_prediction_stay_in_fp8(tmp_path):
    """Megatron counts the decoder's layers from both ends."""
    path = tmp_path / "model.yaml"
    path.write_text(f"{MODEL}  first-last-layers-bf16: true\n  num-layers-at-end-in-bf16: 2\n")
    assert read_model(str(path)).bf16_ends == (1, 2)
    model = replace(TINY, precision=Precision.MXFP8, prediction_heads=2, bf16_ends=(1, 1))
    in_fp8 = [model.for_layer(layer).precision.is_quantised for layer in range(4)]
    assert in_fp8 == [False, True, False, True]
