"""Fits recover the constants behind synthetic timings, and noise breaks no fit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.choices import Recompute
from megatron_laer.config import FSEPConfig
from megatron_laer.files.shipped import yaml_file
from megatron_laer.layer.experts.gemm import slot_gemm
from megatron_laer.planner.cluster_files import cluster_text, load_cluster, parse_cluster
from megatron_laer.planner.clusters import Figure, Link, SolveTime
from megatron_laer.runtime.build import in_model, layer_costs
from megatron_laer.tools.calibration import quantities
from megatron_laer.tools.calibration.constants import (
    implausible,
    measured_cluster,
    off_curve,
    with_card,
)
from megatron_laer.tools.calibration.fitting import (
    figure_of,
    fit_curve,
    fit_link,
    fit_solve,
    fit_terms,
    rates_of,
    rounded,
)
from megatron_laer.tools.calibration.gemms import product_of
from megatron_laer.tools.calibration.links import partner_ranks
from megatron_laer.tools.calibration.quantities import (
    INTER,
    INTRA,
    AllToAll,
    PlannerCall,
    Product,
    Quantity,
    Single,
)
from megatron_laer.tools.calibration.settings import CalibrationSettings, make_settings
from megatron_laer.tools.model_flags import ExpertSizes
from tests.costs import make_costs

LINKS = {INTRA: Link(2e11, 1e-5, 2e-6), INTER: Link(2.5e10, 3e-5, 4e-6)}
SOLVE, GATE = SolveTime(4e-5, 4e-7, 2e-8), SolveTime(1e-5, 1e-7, 3e-9)
EXPERT = ExpertSizes(1024, 4096, True)
# Per product: seconds of a GEMM without tokens, which reads the weights, and FLOP/s.
SPEEDS = {"forward": (1e-4, 4e14), "input_grad": (1e-4, 4e14), "weight_grad": (3e-4, 2e14)}
SIZES = [2**power for power in range(10, 29, 2)]


def sends(link: Link, peers: int, num_bytes: float) -> float:
    return link.latency_s + peers * link.peer_s + num_bytes / link.bytes_per_s


def slot_seconds(product: str, tokens: int) -> float:
    least_s, speed = SPEEDS[product]
    return least_s + tokens * EXPERT.flops_per_token / speed


def figure(seconds: float) -> Figure:
    return Figure(rounded(seconds), rounded(seconds / 1.1), rounded(seconds * 1.1))


def all_figures(
    chosen: CalibrationSettings,
    links: Mapping[str, Link] = LINKS,
    peers: tuple[int, ...] = (1, 3, 7),
) -> dict[Quantity, Figure]:
    found: dict[Quantity, Figure] = {
        Product(back_end, product, tokens): figure(slot_seconds(product, tokens) * factor)
        for back_end, factor in (("loop", 1.0), ("torch", 0.5))
        for product in SPEEDS
        for tokens in chosen.tokens
    }
    for (name, link), count, sent in itertools.product(links.items(), peers, chosen.sent_bytes):
        found[AllToAll(name, count, sent)] = figure(sends(link, count, sent))
    for shape in chosen.shapes:
        found[PlannerCall(quantities.SOLVE, *shape)] = figure(SOLVE.seconds(*shape))
        found[PlannerCall(quantities.GATE, *shape)] = figure(GATE.seconds(*shape))
    return found | {
        Single(quantities.ALL_GATHER, 536): figure(2e-5),
        Single(quantities.COUNTS, 64): figure(5e-5),
        Single(quantities.LAUNCH): figure(4e-6),
        Single(quantities.COPY, 2**30): figure(2 * 2**30 / 1.5e12),
        Single(quantities.ALONE.format(quantities.GEMM)): figure(1e-3),
        Single(quantities.BESIDE.format(quantities.GEMM)): figure(1.2e-3),
        Single(quantities.ALONE.format(quantities.EXCHANGE)): figure(2e-3),
        Single(quantities.BESIDE.format(quantities.EXCHANGE)): figure(2.2e-3),
    }


CHOSEN = make_settings(EXPERT, 8, on_cuda=True, quick=False)
MEASURED = {"hardware": "32 x something", "date": "2026-11-26"}


@pytest.fixture(scope="module")
def cluster():
    return measured_cluster(all_figures(CHOSEN), CHOSEN, 4, "found", MEASURED)


def test_constants_are_found_again_from_what_they_make(cluster):
    for name, link in (("intra", cluster.intra), ("inter", cluster.inter)):
        for constant in Link.__match_args__:
            expected = getattr(LINKS[name], constant)
            assert getattr(link, constant) == pytest.approx(expected, rel=0.01), (name, constant)
    tokens_P = np.array(CHOSEN.tokens)
    expected_P = [slot_seconds("forward", int(tokens)) for tokens in tokens_P]
    found_P = cluster.gemm.unit_seconds(tokens_P) * EXPERT.flops_per_token
    np.testing.assert_allclose(found_P, expected_P, rtol=1e-3)
    # For 64 and 8192 tokens; forward and input gradient are equal, the weight gradient is slower.
    ratios = [slot_seconds("weight_grad", n) / slot_seconds("forward", n) for n in (64, 8192)]
    factor = cluster.backward_gemm_factor
    assert (1 + min(ratios)) / 2 <= factor <= (1 + max(ratios)) / 2
    for constant in SolveTime.__match_args__:
        assert getattr(cluster.solve, constant) == pytest.approx(getattr(SOLVE, constant), rel=0.01)
    assert cluster.host is not None
    assert cluster.host.launch_s == 4e-6
    assert cluster.host.replicas_s == pytest.approx(150 * 4e-6)
    assert cluster.host.gate.slot_s == pytest.approx(GATE.slot_s, rel=0.01)
    # Includes the time of counts' exchange outside its All-gather.
    assert cluster.host.gate.base_s == pytest.approx(GATE.base_s + 3e-5, rel=0.01)
    assert (cluster.contention.gemm, cluster.contention.exchange) == (1.2, 1.1)
    assert cluster.memory_bytes_per_s == pytest.approx(1.5e12, rel=1e-3)
    assert (cluster.nodes, cluster.ranks_per_node) == (4, 8)
    assert cluster.assumed == "Host time of replicas is that of 150 launches"


def test_every_constant_has_a_spread_with_its_figures_in_it(cluster):
    spreads = dict(cluster.spreads)
    gemm = (spreads["gemm"].low, spreads["gemm"].high)
    assert gemm == pytest.approx((1 / 1.1, 1.1), rel=1e-3)
    assert spreads["intra.bytes_per_s"].high >= 2e11 >= spreads["intra.bytes_per_s"].low
    assert spreads["memory_bytes_per_s"].low == pytest.approx(1.5e12 / 1.1, rel=1e-3)
    assert spreads["contention.gemm"].high == pytest.approx(1.2 * 1.1, rel=1e-3)
    assert {"host.launch_s", "host.gate", "solve", "backward_gemm_factor"} <= spreads.keys()
    assert spreads["intra.bytes_per_s"].low < spreads["intra.bytes_per_s"].high


def test_a_gpus_file_has_the_rest_from_the_shipped_cluster_of_such_cards(cluster):
    like = load_cluster("h100-8")
    found = with_card(cluster, 79.1, like)
    assert found.card == replace(like.card, memory_gib=79.1)
    said = "The card but for its memory is that of h100-8"
    assert found.assumed == f"{cluster.assumed}. {said}"
    assert parse_cluster(cluster_text(found)) == found
    assert with_card(replace(cluster, assumed="nothing"), 80, like).assumed == said


def test_implausible_constants_are_named(cluster):
    assert implausible(cluster) == []
    disturbed = cluster.with_constants({"backward_gemm_factor": 0.2963, "contention.exchange": 6.4})
    assert implausible(disturbed) == [
        "backward_gemm_factor 0.296 (usual are 0.6 to 2.5)",
        "contention.exchange 6.4 (usual are 1 to 4)",
    ]
    faster = cluster.with_constants({"contention.exchange": 0.8762})
    assert implausible(faster) == ["contention.exchange 0.876 (usual are 1 to 4)"]
    for file in yaml_file("cluster", "h100-8").parent.glob("*.yaml"):
        assert implausible(load_cluster(file)) == [], file


def test_points_off_their_curve_are_named(cluster):
    assert off_curve(cluster) == []
    figures = all_figures(CHOSEN)
    keys = (
        AllToAll("inter", 3, 2**20),
        PlannerCall(quantities.SOLVE, 64, 2, 64),
        Product("loop", "input_grad", 4096),
    )
    for tokens in CHOSEN.tokens:
        even_s = tokens * EXPERT.flops_per_token / 1e12
        figures[Product("loop", "input_grad", tokens)] = figure(even_s)
    for key, times in zip(keys, (5, 5, 1 / 3), strict=True):
        figures[key] = figure(figures[key].median * times)
    found = off_curve(measured_cluster(figures, CHOSEN, 4, "found", MEASURED))
    assert len(found) == len(keys)
    for text, key in zip(found, keys, strict=True):
        assert text.startswith(str(key).removesuffix(", s"))


def test_the_file_holds_all_of_it(cluster):
    assert parse_cluster(cluster_text(cluster)) == cluster
    assert [back_end.name for back_end in cluster.back_ends] == ["loop", "torch"]
    assert cluster.for_back_end("torch").gemm.points[-1][1] == pytest.approx(
        2 * cluster.gemm.points[-1][1], rel=1e-3
    )
    assert len(dict(cluster.figures)) == len(all_figures(CHOSEN))
    assert all(name.endswith(", s") for name, _ in cluster.figures)
    assert dict(cluster.measured) == MEASURED


@pytest.mark.parametrize("there", [INTRA, INTER])
def test_links_that_are_not_there_have_the_numbers_of_those_that_are(there):
    figures = all_figures(CHOSEN, {there: LINKS[there]}, peers=(1,))
    cluster = measured_cluster(figures, CHOSEN, 1, "found", MEASURED)
    assert cluster.intra == cluster.inter
    assert f"they have the numbers of {there}-node links" in cluster.assumed
    # A single number of peers does not determine latency per peer.
    assert cluster.intra.peer_s == 0.0
    spreads = dict(cluster.spreads)
    for constant in ("bytes_per_s", "latency_s"):
        assert spreads[f"intra.{constant}"] == spreads[f"inter.{constant}"]


NOISE = st.lists(st.floats(0.7, 1.4), min_size=27, max_size=27)


@settings(max_examples=100)
@given(NOISE)
def test_noise_moves_a_links_rate_no_further_than_itself(noise):
    cases = list(itertools.product((1, 3, 7), SIZES[:9]))
    exchanges = [
        (peers, sent, sends(LINKS[INTRA], peers, sent) * factor)
        for (peers, sent), factor in zip(cases, noise, strict=True)
    ]
    link = fit_link(exchanges)
    # The rate dominates the largest messages.
    assert 2e11 / 2 < link.bytes_per_s < 2e11 * 2
    assert 2e11 / 4 < statistics.median(rates_of(link, exchanges)) < 2e11 * 4


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12))
def test_any_times_make_a_curve_a_link_and_a_solve_time(times):
    curve = fit_curve([(4**place, seconds) for place, seconds in enumerate(times)], 1e9)
    assert [tokens for tokens, _ in curve.points] == [4**place for place in range(len(times))]
    # Written and scaled in the same way.
    curve.times(0.9), curve.times(1.1)
    link = fit_link([(1, 2 ** (10 + place), seconds) for place, seconds in enumerate(times)])
    assert link.latency_s >= 0 and link.peer_s == 0
    assert fit_solve([((2**place, 2, 8), s) for place, s in enumerate(times)]).base_s >= 0


def test_a_point_that_was_faster_than_one_with_fewer_tokens_is_lifted():
    curve = fit_curve([(1, 2.0), (2, 1.0), (4, 8.0)], 10.0)
    seconds = curve.unit_seconds(np.array([1, 2, 4])) * 10.0
    np.testing.assert_allclose(seconds, [2.0, 2.0, 8.0], rtol=2e-3)


def test_no_factor_is_negative_and_terms_that_explain_nothing_are_zero():
    terms_PT = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    for times_P, factors_T in (([3.0, 5.0, 9.0], [1.0, 2.0]), ([2.0, 4.0, 8.0], [0.0, 2.0])):
        np.testing.assert_allclose(fit_terms(terms_PT, np.array(times_P)), factors_T, atol=1e-9)
    falling_T = fit_terms(terms_PT, np.array([4.0, 2.0, 1.0]))
    assert (falling_T >= 0).all() and falling_T.max() > 0


def test_a_figure_is_the_median_with_the_percentiles_around():
    found = figure_of(range(1, 102))
    assert (found.median, found.low, found.high) == (51, 11, 91)


@pytest.mark.parametrize("gated", [False, True])
def test_expert_sizes_are_those_of_the_cost_model(gated):
    shape, costs = ExpertSizes(64, 24, gated), make_costs(hidden=64, ffn=24, gated=gated)
    assert (shape.matrices, shape.flops_per_token) == (costs.matrices, costs.flops_per_token)


@pytest.mark.parametrize(
    ("world", "node_size"), [(2, 2), (2, 1), (4, 2), (6, 3), (12, 4), (16, 8), (24, 6), (32, 8)]
)
def test_groups_of_partners_divide_the_ranks_and_stay_in_their_links(world, node_size):
    found = partner_ranks(world, node_size)
    for link, groups in found:
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(world))
        assert len(set(map(len, groups))) == 1 and len(groups[0]) > 1
        for ranks in groups:
            nodes = {rank // node_size for rank in ranks}
            assert len(nodes) == (1 if link == INTRA else len(ranks))
    largest = {
        link: max((len(groups[0]) for name, groups in found if name == link), default=1)
        for link in (INTRA, INTER)
    }
    assert largest == {INTRA: node_size, INTER: world // node_size}


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_settings_have_points_in_order_and_tokens_that_count(on_cuda, quick):
    chosen = make_settings(EXPERT, 2, on_cuda=on_cuda, quick=quick)
    for points in (chosen.tokens, chosen.sent_bytes):
        assert list(points) == sorted(set(points))
    # A fit of three terms needs three shapes.
    assert chosen.tokens[0] == 1 and len(chosen.shapes) >= 3


MODEL: Mapping[str, Any] = {
    "hidden_size": 8,
    "moe_ffn_hidden_size": 8,
    "gated_linear_unit": True,
    "params_dtype": torch.bfloat16,
    "recompute_granularity": None,
}


def test_training_predicts_by_the_gemms_of_the_back_end_that_computes(tmp_path, cluster):
    path = tmp_path / "found.yaml"
    path.write_text(cluster_text(cluster))
    for back_end in ("loop", "torch"):
        config = FSEPConfig(cluster=str(path), gemm=back_end)  # type: ignore[arg-type]
        costs = layer_costs(config, SimpleNamespace(**MODEL), torch.device("cpu"))
        (expected,) = (found for found in cluster.back_ends if found.name == back_end)
        assert costs.cluster.gemm == expected.forward
        factor = costs.cluster.backward_gemm_factor
        assert factor == pytest.approx(expected.backward_gemm_factor, rel=1e-3)


@pytest.mark.parametrize(
    ("granularity", "modules", "recompute"),
    [
        (None, ["core_attn"], Recompute.NONE),
        ("selective", ["core_attn", "moe_act"], Recompute.NONE),
        ("selective", ["layernorm", "moe"], Recompute.FULL),
        ("full", ["core_attn"], Recompute.FULL),
    ],
)
def test_training_prices_what_megatron_recomputes(granularity, modules, recompute):
    more = {"recompute_granularity": granularity, "recompute_modules": modules}
    model = SimpleNamespace(**MODEL | more)
    assert layer_costs(FSEPConfig(), model, torch.device("cpu")).recompute == recompute


@pytest.mark.parametrize(
    ("more", "tolerance", "layers"),
    [
        ({}, None, 24),
        ({"overlap_moe_expert_parallel_comm": True}, None, 48),
        ({"overlap_moe_expert_parallel_comm": True, "pipeline_model_parallel_size": 2}, None, 24),
        ({"cuda_graph_impl": "transformer_engine"}, None, None),
        ({}, 0.1, None),
    ],
)
def test_training_lets_the_host_hide_imbalance_by_its_models_sizes(more, tolerance, layers):
    sizes = {"num_layers": 24, "tensor_model_parallel_size": 2, "context_parallel_size": 4}
    usual = {"pipeline_model_parallel_size": 1, "overlap_moe_expert_parallel_comm": False}
    model = SimpleNamespace(**MODEL | sizes | usual | {"cuda_graph_impl": "none"} | more)
    config = FSEPConfig(imbalance_tolerance=tolerance)
    found = in_model(config, layer_costs(config, model, torch.device("cpu")), model)
    assert (found.layers, found.sharers) == (layers, 1 if layers is None else 8)


def test_an_expert_that_does_not_fit_into_memory_is_refused():
    chosen = make_settings(EXPERT, 8, on_cuda=True, quick=False)
    chosen.check_memory(chosen.gemm_bytes)
    with pytest.raises(ValueError, match=r"size 1024 and width 4096 would take .* GiB of a r"):
        chosen.check_memory(chosen.gemm_bytes - 1)


def test_products_take_about_the_memory_that_is_estimated(monkeypatch):
    chosen = make_settings(ExpertSizes(64, 96, gated=True), 1, on_cuda=False, quick=True)
    taken = []
    for name in ("randn", "empty_like"):
        make = getattr(torch, name)

        def recording(*args, make=make, **kwargs):
            taken.append(tensor := make(*args, **kwargs))
            return tensor

        monkeypatch.setattr(torch, name, recording)
    device = torch.device("cpu")
    product_of(slot_gemm("loop"), quantities.FORWARD, chosen.tokens[-1], chosen, device)
    # The estimate includes the outputs.
    taken_bytes = sum(tensor.nbytes for tensor in taken)
    assert taken_bytes <= chosen.gemm_bytes <= 2 * taken_bytes
