"""Work of an iteration: counts by method, sizes of models, and properties that hold for any rates.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.choices import Dispatch, ExchangeAlgorithm, Recompute, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.life import Kind
from megatron_laer.planner.balance import stock_tokens_N
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import even_split
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices
from megatron_laer.precision import Precision
from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.layer_times import Timing
from megatron_laer.tools.simulator.iteration.methods import FSEP, METHODS, STOCK, MethodSettings
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.predict import predict_iterations
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import (
    Exchange,
    LayerWork,
    TokenPassing,
    grouped_totals,
)
from megatron_laer.tools.simulator.replay import Routing
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_trace
from tests.oracles import costs as priced
from tests.tools.plan_cases import drifting_trace

CLUSTER = load_cluster("a100-4x8-ib800")
TINY = replace(read_model("mixtral-8x7b-e8k2"), layer_has_experts=(True,) * 4)
H100 = replace(load_cluster("h100-8"), spreads=())
RATES = Rates(CLUSTER, 2)
ALONE = Schedule.of({Kind.ALONE})


def predicted(trace, model=TINY, names=METHODS, rates=(RATES,), mode="adaptive", **run):
    sharding = run.pop("sharding", Sharding.ROWS)
    geometry = Geometry(trace.num_ranks, trace.num_experts, 3, trace.num_ranks // 2, sharding)
    routing = Routing(trace, trace.num_ranks, model.topk)
    config = FSEPConfig(plan_mode=mode, restore=run.pop("restore", "layer"))
    costs = CostModel(CLUSTER, model.hidden, model.expert_ffn, model.gated, 2)
    chosen = MethodSettings(geometry, costs, config)
    methods = [METHODS[name](chosen, RATES) for name in names]
    sizes = {"tokens": round(routing.pairs / model.topk), "microbatches": 4} | run
    shape = RunShape(trace.num_ranks, geometry.node_size, **sizes)
    found = predict_iterations(routing, model, shape, methods, rates, steps=2)
    return {prediction.method: prediction for prediction in found}


def test_models_have_the_published_numbers_of_weights():
    model = read_model("mixtral-8x7b-e8k2")
    dense = sum(
        model.attention_weights + model.dense_weights(has) for has in model.layer_has_experts
    )
    experts = model.moe_layers * model.expert_weights
    total, active = (
        2 * model.head_weights + dense + experts * number
        for number in (model.num_experts, model.topk)
    )
    assert total == pytest.approx(46.7e9, rel=0.002)
    assert active == pytest.approx(12.9e9, rel=0.01)


MODEL = """description: x
architecture:
  num-layers: 4
  hidden-size: 64
  ffn-hidden-size: 96
  num-attention-heads: 4
moe:
  num-experts: 8
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("moe-layer-freq: ([0]*3+[1]*2)", "add up to the 4 layers"),
        ("moe-layer-freq: __import__('os')", "moe-layer-freq"),
        ("moe-layer-freq: ([0]*4)", "hold a 1"),
        ("mtp-num-layers: many", "has no mtp-num-layers in 0..4096, but 'many'"),
        ("moe-shared-expert-intermediate-size: -3", "has no moe-shared-expert-intermediate-size"),
    ],
)
def test_models_that_do_not_say_what_is_needed_are_refused(tmp_path, line, problem):
    path = tmp_path / "model.yaml"
    path.write_text(MODEL)
    assert read_model(str(path)).layer_has_experts == (True,) * 4
    path.write_text(f"{MODEL}  {line}\n")
    with pytest.raises(ValueError, match="has ") as error:
        read_model(str(path))
    assert problem in str(error.value)


def test_dense_layers_and_prediction_layers_are_told_apart(tmp_path):
    path = tmp_path / "model.yaml"
    attention = "multi-latent-attention: true, q-lora-rank: 24, kv-lora-rank: 16, qk-head-dim: 8, "
    attention += "qk-pos-emb-head-dim: 4, v-head-dim: 8, mtp-num-layers: 1"
    more = "".join(f"  {line}\n" for line in attention.split(", "))
    experts = "  moe-layer-freq: ([0]*1+[1]*3)\n  moe-ffn-hidden-size: 32\n"
    path.write_text(MODEL.replace("moe:\n", f"{more}moe:\n") + experts)
    model = read_model(str(path))
    assert model.layer_has_experts == (False, True, True, True, True)
    assert model.prediction_heads == 2
    # Query down and up, key and value down with the rotary part, up, and output.
    expected = 64 * 24 + 24 * 4 * 12 + 64 * (16 + 4) + 16 * 4 * (8 + 8) + 4 * 8 * 64
    assert model.attention_weights == expected


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), nodes=st.sampled_from([1, 2, 4]), group=st.sampled_from([4, 8]))
def test_stocks_tokens_are_those_of_its_placement(seed, nodes, group):
    """Compare with a loop over every source, rank and expert."""
    num_ranks, num_experts = 8, 16
    counts_NE = np.random.default_rng(seed).integers(0, 50, (num_ranks, num_experts))
    node_size = num_ranks // nodes
    totals = grouped_totals(counts_NE, group, node_size)
    each = num_experts // group
    near, far = np.zeros((2, num_ranks, each), dtype=int)
    sent_near, sent_far, own = np.zeros((3, num_ranks), dtype=int)
    for source, expert in np.ndindex(counts_NE.shape):
        rank = source // group * group + expert // each
        count = counts_NE[source, expert]
        is_near = source // node_size == rank // node_size
        (near if is_near else far)[rank, expert % each] += count
        (sent_near if is_near else sent_far)[source] += count
        own[source] += count if rank == source else 0
    assert totals.near_S.tolist() == near.reshape(-1).tolist()
    assert totals.far_S.tolist() == far.reshape(-1).tolist()
    assert totals.sent_near_N.tolist() == sent_near.tolist()
    assert totals.sent_far_N.tolist() == sent_far.tolist()
    assert totals.own_N.tolist() == own.tolist()
    if group == num_ranks:
        loads_N = (totals.near_S + totals.far_S).reshape(num_ranks, -1).sum(axis=1)
        assert loads_N.tolist() == stock_tokens_N(counts_NE).tolist()


@pytest.mark.parametrize("in_stages", [False, True])
@pytest.mark.parametrize("precision", Precision)
def test_an_exchange_takes_what_the_cost_model_says(in_stages, precision):
    algorithm = ExchangeAlgorithm.NODE if in_stages else ExchangeAlgorithm.FLAT
    sharding = Sharding.EXPERTS if precision.is_quantised else Sharding.ROWS
    geometry = Geometry(16, 16, 3, 8, sharding)
    costs = CostModel(H100, 4096, 14336, True, 2, precision=precision)
    of = Placed(geometry.random_layout((1,)), geometry), way_of(geometry, algorithm)
    restore = costs.restore_bytes(*of), costs.weights_form(sharding)
    reduce = costs.reduce_bytes(*of), costs.grads_form
    expected_s = priced.restore_seconds(costs, *of), priced.reduce_seconds(costs, *of)
    for (traffic, form), seconds in zip((restore, reduce), expected_s, strict=True):
        exchange = Exchange.of(traffic, form, geometry)
        assert exchange.seconds(Rates(H100, 2)) == pytest.approx(seconds)


def test_a_layers_compute_and_tokens_are_the_cost_models():
    """Where only GEMMs and links cost time, both models have the same layer."""
    cluster = replace(CLUSTER, host=None, spreads=())
    layout = ExpertLayout.random(8, 3, 16, (5,))
    by_node = TokenPrices(Dispatch.NODE, intra_rows=0.9, inter_rows=0.5)
    for seed, prices in itertools.product(range(8), (BY_RANK, by_node)):
        costs = CostModel(cluster, 4096, 14336, True, 2, tokens=prices)
        passing, flops = TokenPassing(prices=prices), costs.flops_per_token
        rng = np.random.default_rng(seed)
        counts_NE = rng.integers(0, 50, (8, 16)) ** 2 * rng.integers(1, 20, (8, 1))
        totals = even_split(layout, 2).totals(counts_NE)
        work = LayerWork.of(totals, Rates(cluster, 2), passing=passing, node_size=2)
        none_N = 0 * work.intra_N
        parts = replace(work, intra_N=none_N), replace(work, inter_N=none_N)
        parts_s = [passing.seconds(of, costs.token_bytes, cluster).max() for of in parts]
        pass_s = sum(parts_s) if prices.in_stages else max(parts_s)
        expert_s = flops * (1 + 2 * cluster.backward_gemm_factor) * work.unit_s_N.max()
        geometry = Geometry(8, 16, 3, 2)
        seconds = expert_s + 4 * (pass_s + costs.token_latency_seconds(geometry))
        assert seconds == pytest.approx(costs.split_seconds(totals, geometry))


def test_the_host_takes_time_for_replicas_where_the_device_does_not_hide_it():
    geometry = Geometry(8, 16, 3, 8, Sharding.EXPERTS)
    layout, costs = geometry.random_layout((1,)), CostModel(H100, 4096, 14336, True, 2)
    placed, form = Placed(layout, geometry), costs.weights_form(geometry.sharding)
    traffic = costs.restore_bytes(placed, costs.way_of(placed))
    restore = Exchange.of(traffic, form, geometry)
    totals = even_split(layout, 8).totals(np.full((8, 16), 100))

    def forward_s(replicas_s, restore):
        host = replace(H100.host, launch_s=0.0, replicas_s=replicas_s)
        rates = Rates(replace(H100, host=host), 2)
        timing = Timing(TINY, RunShape(8, 8, tokens=800, microbatches=1), rates, rates)
        return timing.layer(0, LayerWork.of(totals, rates, restore), ALONE).alone_s[0]["host"]

    without_s = forward_s(1.0, None)
    assert forward_s(0.0, restore) == forward_s(1e-7, restore) == without_s
    assert 0 < forward_s(1.0, restore) - without_s < 1.0


def test_rings_drive_the_adapters_of_their_own_ranks():
    intra, inter = CLUSTER.intra, CLUSTER.inter
    near_s = RATES.ring_seconds(8e9, 8, 8)
    assert near_s == pytest.approx(7e9 / intra.bytes_per_s + intra.latency_s, rel=1e-3)
    # Two adapters of a node, as its other ranks have rings of their own; or one.
    for stride, adapters in ((4, 2), (8, 1), (32, 1)):
        seconds = RATES.ring_seconds(8e9, 8, 8, stride)
        expected_s = 7e9 / (adapters * inter.bytes_per_s) + inter.latency_s
        assert seconds == pytest.approx(expected_s, rel=1e-3)
    # Each further rank is a step more, and an empty buffer takes the steps alone.
    few_s, many_s = (RATES.ring_seconds(0.0, ranks, 8, 8) for ranks in (2, 16))
    assert many_s == pytest.approx(few_s + 14 * 1.4e-5)


def test_a_layers_host_time_grows_with_its_slots_and_chunks_and_hides_behind_the_device():
    def host_s(tokens, launch_s, ranks=8, **passing):
        rates = Rates(replace(H100, host=replace(H100.host, launch_s=launch_s)), 2)
        timing = Timing(TINY, RunShape(8, 8, tokens=tokens, microbatches=1), rates, rates)
        totals = grouped_totals(np.full((8, 16), tokens // 8), ranks, 8)
        work = LayerWork.of(totals, rates, passing=TokenPassing(ranks, **passing))
        return tuple(of["host"] for of in timing.layer(0, work, ALONE).alone_s)

    assert host_s(800, 0.0) == host_s(10**8, 4e-6) == (0.0, 0.0)
    forward_s, backward_s = host_s(800, 1.0)
    assert backward_s == pytest.approx(2 * forward_s, rel=1e-3)
    assert forward_s < host_s(800, 1.0, ranks=2)[0] < host_s(800, 1.0, 2, sorts_chunks=True)[0]


def test_stocks_groups_wait_for_their_own_counts():
    """Make one of two groups of four busy in both layers, or each group in one of them."""
    step_R, layer_R = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    model = replace(TINY, layer_has_experts=(True,) * 2, num_experts=4)
    found = []
    for busy in (slice(0, 4), slice(4, 8)):
        counts_RNE = np.full((4, 8, 4), 400, dtype=np.int32)
        counts_RNE[layer_R == 0, :4, 0] += 40000
        counts_RNE[layer_R == 1, busy, 0] += 40000
        trace = Trace(("1", "2"), step_R, layer_R, np.zeros_like(step_R), counts_RNE)
        found.append(predicted(trace, model, names=[STOCK], microbatches=1)[STOCK].iteration_s)
    assert found[1] < 0.6 * found[0], found


def test_balanced_routing_gives_stock_the_time_of_perfect_balance():
    trace = workload_trace("W0", WorkloadShape(8, 8, 2, 4096), 4)
    found = predicted(trace, names=[STOCK])[STOCK]
    assert found.max_over_mean == 1.0 and found.waiting_s == pytest.approx(0.0, abs=1e-9)


def test_parts_add_up_to_the_iteration_and_ranges_hold_it():
    found = predicted(drifting_trace(), rates=rate_sets(RATES))
    assert set(found) == set(METHODS)
    for prediction in found.values():
        parts = [*prediction.compute_s.values(), *prediction.exposed_s.values()]
        assert sum(parts) + prediction.waiting_s == pytest.approx(prediction.iteration_s)
        assert min(*parts, prediction.waiting_s) >= 0
        assert prediction.low_s < prediction.iteration_s < prediction.high_s
        assert 0 < prediction.mfu < 1
    # Routing is skewed: FSEP balances it and stock does not. So few tokens hide no restore.
    assert found[FSEP].max_over_mean < 1.2 < 1.5 < found[STOCK].max_over_mean
    assert found[FSEP].waiting_s < found[STOCK].waiting_s / 2
    assert found[FSEP].exposed_s["restore"] > found[STOCK].exposed_s["restore"] == 0


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=10)
@given(factor=st.floats(1.0, 50.0), link=st.sampled_from(["intra", "inter"]))
def test_more_bandwidth_is_never_slower(method, factor, link):
    """Keep the decisions, which use the cluster's constants, while the rates change."""
    name = f"{link}.bytes_per_s"
    value = CLUSTER.constant(name) * factor
    faster = replace(RATES, cluster=CLUSTER.with_constants({name: value}))
    found = predicted(drifting_trace(steps=3), names=[method], rates=(RATES, faster))[method]
    assert found.by_rates_s[1] <= found.by_rates_s[0] * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["forecast", "exact", "adaptive"])
def test_all_modes_of_the_guard_run(mode):
    found = predicted(drifting_trace(), names=[FSEP], mode=mode)[FSEP]
    if mode == "exact":
        assert found.max_over_mean < 1.001
        assert found.exposed_s["restore"] > 0


def test_recompute_costs_a_forward_and_its_tokens_and_saves_memory():
    trace = workload_trace("W0", WorkloadShape(8, 8, 2, 4096), 4)
    none, compute, full = (
        predicted(trace, names=[STOCK], recompute=recompute)[STOCK]
        for recompute in (Recompute.NONE, Recompute.COMPUTE, Recompute.FULL)
    )
    assert none.compute_s["experts"] < compute.compute_s["experts"]
    assert compute.compute_s["experts"] == pytest.approx(full.compute_s["experts"])
    assert full.exposed_s["tokens"] == pytest.approx(1.5 * compute.exposed_s["tokens"])
    assert full.memory_bytes["activations"] < none.memory_bytes["activations"] / 2


def test_pipelines_replicas_and_chunks_are_simulated():
    trace = drifting_trace()
    flat = predicted(trace, names=[FSEP, STOCK])
    staged = predicted(trace, names=[FSEP, STOCK], stages=2, chunks=2, replicas=2)
    for name in (FSEP, STOCK):
        assert staged[name].exposed_s["pipeline"] > 0 == flat[name].exposed_s["pipeline"]
        assert staged[name].memory_bytes["weights"] < flat[name].memory_bytes["weights"]
        # Twice the tokens, on four times the ranks.
        assert staged[name].iteration_s < flat[name].iteration_s
    assert staged[FSEP].tokens_per_s > flat[FSEP].tokens_per_s


def number(trace, step):
    return trace.step_R[step[0][0]]


def test_routing_deals_out_ranks_and_tokens():
    trace = drifting_trace()
    wide = Routing(trace, 8, topk=2, tokens=500)
    counts_NE = wide.counts_NE(0)
    assert counts_NE.shape == (8, 8) and abs(counts_NE.sum(axis=1) - 1000).max() <= 1
    assert [number(trace, step) for step, _ in wide.walk(2)] == [1, 5]
    with pytest.raises(ValueError, match="the trace holds 1 step"):
        list(Routing(drifting_trace(steps=1), 8, topk=2).walk(1))


def test_steps_that_lack_a_layer_are_not_simulated():
    """Steps 0 and 1 lack a layer, as after a killed and resumed run."""
    keys = [(0, 0), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    step_R, layer_R = np.array(keys).T
    counts_RNE = np.ones((len(keys), 2, 4), dtype=np.int32)
    trace = Trace(("1", "2"), step_R, layer_R, np.zeros_like(step_R), counts_RNE)
    assert [number(trace, step) for step, _ in Routing(trace, 2, topk=2).walk(9)] == [3, 4]


def test_many_microbatches_are_extended_from_few_to_the_same_iteration():
    model = replace(read_model("tiny-moe"), sequence=512)
    trace = workload_trace("W6", WorkloadShape(4, 8, 2, 512), 4, layers=2, microbatches=3)
    routing, cluster = Routing(trace, 4, 2), load_cluster("h100-8")
    geometry = Geometry(4, 8, 3, 4)
    settings = MethodSettings(geometry, model.costs(cluster, Recompute.NONE, routing.pairs), topk=2)
    rates = Rates(cluster, model.bytes_per_element)
    methods = [METHODS[name](settings, rates) for name in METHODS]
    for stages, chunks in ((1, 1), (2, 1), (2, 2)):
        run = RunShape(4, 4, 512, 24, stages, chunks)
        whole, short = (
            predict_iterations(routing, model, run, methods, [rates], most=most) for most in (24, 0)
        )
        for one, other in zip(whole, short, strict=True):
            assert other.iteration_s == pytest.approx(one.iteration_s, rel=1e-2)
            assert other.peak_bytes == pytest.approx(one.peak_bytes, rel=1e-6)
            spent = sum((*other.compute_s.values(), *other.exposed_s.values(), other.waiting_s))
            assert spent == pytest.approx(other.iteration_s)
