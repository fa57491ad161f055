"""Predicted seconds equal their definition and respect physical bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.choices import Auto, Dispatch, ExchangeAlgorithm, Recompute, Split
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import HostTime, Link, SolveTime
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import even_split
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.precision import Precision
from tests.costs import COMPUTE_ONLY, make_costs
from tests.oracles import costs as oracle
from tests.placed import placed
from tests.unit.planner_cases import any_counts, geometries, home_geometries

# Curved, with transfers and latencies that matter next to compute.
COSTS = make_costs(
    points=((1, 1e8), (16, 1e9), (256, 1e10)),
    intra=Link(3e8, 1e-6, 2e-7),
    inter=Link(2e7, 3e-6, 4e-7),
    solve=SolveTime(1e-5, 1e-7, 1e-8),
    memory_bytes_per_s=1e12,
    host=HostTime(2e-6, SolveTime(1e-5, 1e-7, 1e-8)),
    backward_gemm_factor=1.4,
)
ANY = geometries(40, 64)


@settings(max_examples=100)
@given(geometries(16, 64), st.sampled_from(list(Recompute)), st.sampled_from(ExchangeAlgorithm))
def test_what_no_split_changes_equals_its_definition(
    geometry: Geometry, recompute: Recompute, algorithm: ExchangeAlgorithm
) -> None:
    costs = replace(COSTS, recompute=recompute, restore_algorithm=algorithm)
    num_ranks, node_size = geometry.num_ranks, geometry.node_size
    intra, inter, host = costs.cluster.intra, costs.cluster.inter, costs.cluster.host
    assert host is not None
    latency_s = gathered_s = 0.0
    if num_ranks > 1:
        far, link = num_ranks - node_size, intra if num_ranks == node_size else inter
        latency_s = link.latency_s + (node_size - 1) * intra.peer_s + far * inter.peer_s
        words = geometry.num_experts // math.gcd(geometry.num_experts, 4)
        received = (num_ranks - 1) * (geometry.num_experts + words + 3)
        gathered_s = latency_s + 8 * received / link.bytes_per_s
    assert costs.token_latency_seconds(geometry) == pytest.approx(latency_s)
    slots, counts = geometry.num_slots, num_ranks * geometry.num_experts
    gate_s = host.gate.base_s + slots * host.gate.slot_s + counts * host.gate.count_s
    launches = 50 if algorithm != "flat" and num_ranks > node_size else 47
    host_s = gathered_s + gate_s + launches * host.launch_s
    assert costs.host_seconds(geometry) == pytest.approx(host_s)
    forwards = 1 if recompute == Recompute.NONE else 2
    gemms = forwards + 2 * costs.cluster.backward_gemm_factor
    assert costs._expert_flops == pytest.approx(gemms * costs.flops_per_token)
    # Both directions of forward, perhaps again, and of backward.
    assert costs.token_passes == 2 * (3 if recompute == Recompute.FULL else 2)


@settings(max_examples=300)
@given(
    ANY | home_geometries(),
    st.integers(0, 2**16),
    st.sampled_from([*ExchangeAlgorithm, Auto.AUTO]),
    st.sampled_from([TokenPrices(), TokenPrices(Dispatch.NODE, 0.7, 0.3)]),
    st.sampled_from(list(Recompute)),
)
def test_native_seconds_equal_those_of_the_oracle_to_the_last_bit(
    geometry: Geometry,
    seed: int,
    algorithm: ExchangeAlgorithm | Auto,
    tokens: TokenPrices,
    recompute: Recompute,
) -> None:
    precision = [*Precision][seed % 4] if geometry.home_slots else Precision.PARAMETERS
    costs = replace(COSTS, ffn=40, tokens=tokens, precision=precision, recompute=recompute)
    costs = costs.with_exchange(algorithm, geometry)
    counts_NE, node_size = any_counts(geometry, seed), geometry.node_size
    layout, other = (geometry.random_layout((seed, n)) for n in (0, 1))
    kept, changed = Placed(layout, geometry), Placed(other, geometry)
    for name, split in ((Split.EXACT, exact_split), (Split.EVEN, even_split)):
        totals = split(layout, node_size).totals(counts_NE)
        layer_s = costs.split_seconds(totals, geometry)
        assert layer_s == oracle.split_seconds(costs, totals, geometry)
        assert layer_s == costs.layer_seconds(counts_NE, kept, name)
    least_s = costs.least_layer_seconds(counts_NE, geometry)
    assert least_s == oracle.least_layer_seconds(costs, counts_NE, geometry)

    change_s = costs.change_seconds(layout, changed)
    assert change_s == oracle.change_seconds(costs, layout, changed)
    assert costs.change_seconds(layout, kept) == 0.0
    if changed.changed_S(kept).any():  # else replicas are dropped at most
        assert costs.least_change_seconds(geometry) <= change_s
        whole_s = oracle.restore_seconds(costs, changed, costs.way_of(changed))
        assert change_s <= whole_s + costs.solve_seconds(geometry)

    way = costs.way_of(kept)
    assert way is oracle.way_of(costs, kept)
    restore_s = oracle.restore_seconds(costs, kept, way)
    for beside_s in (0.0, 0.7 * restore_s, 2.1 * restore_s, layer_s):
        exposed = costs.exposed(kept, beside_s)
        expected = oracle.exposed_seconds(costs, kept, beside_s)
        assert (exposed.exchanges_s, exposed.backward_s) == expected
        exchanges_s = costs.exchanges_seconds(kept, beside_s)
        assert expected[0] <= exchanges_s <= costs.exchanges_seconds(kept, 0.0)
    # Backward has the weights of forward's re-run, but for those of mxfp8.
    again = precision == Precision.MXFP8 and recompute != Recompute.NONE
    all_s = (3 if again else 2) * restore_s + oracle.reduce_seconds(costs, kept, way)
    assert costs.exposed(kept, 0.0).exchanges_s == pytest.approx(all_s, rel=1e-12)
    if geometry.home_slots:
        bare = Placed(geometry.static_layout, geometry)
        assert costs.exposed(bare, 0.0).exchanges_s == 0.0


@settings(max_examples=100)
@given(ANY, st.integers(0, 2**16))
def test_nothing_is_faster_than_the_lower_bound(geometry: Geometry, seed: int) -> None:
    counts_NE = any_counts(geometry, seed)
    random = ExpertLayout.random(*geometry.shape, seed=(seed,))
    again = replace(COSTS, recompute=Recompute.FULL)
    falling = make_costs(points=((1, 1e9), (40, 2e9), (80, 1.9e9)))
    for costs in (COSTS, again, COMPUTE_ONLY, falling):
        least_s = costs.least_layer_seconds(counts_NE, geometry)
        for layout in (random, construct_layout(counts_NE, random, geometry.node_size)):
            for split in (Split.EXACT, Split.EVEN):
                seconds = costs.layer_seconds(counts_NE, Placed(layout, geometry), split)
                assert least_s <= seconds


def test_shapes_and_restores_of_the_papers_setting_have_the_papers_bytes() -> None:
    costs = CostModel(load_cluster("a100-4x8-ib800"), 4096, 14336, True, 2)
    assert costs.matrices == ((2 * 14336, 4096), (4096, 14336))
    assert costs.flops_per_token == 2 * 3 * 4096 * 14336
    assert costs.token_bytes == 8192
    assert replace(costs, gated=False).matrices[0] == (14336, 4096)
    # 32 ranks on 4 nodes, 8 experts, 2 slots: 683 MB received per restore, 528 MB from other nodes.
    costs = CostModel(load_cluster("a100-4x8-ib800"), 4096, 14336, True, 2)
    static = placed(ExpertLayout.static(32, 2, 8), 8)
    flat, node = (way_of(static.geometry, ExchangeAlgorithm(word)) for word in ("flat", "node"))
    received = costs.restore_bytes(static, flat)
    np.testing.assert_allclose(received.intra_N + received.inter_N, 683e6, rtol=1e-3)
    np.testing.assert_allclose(received.inter_N, 528.5e6, rtol=1e-3)
    # The slower class limits: 10 GB/s between nodes, four passes through memory at 1.5 TB/s, and a
    # latency.
    per_byte_s = 1 / 10e9 + 4 / 1.5e12
    expected_s = received.inter_N.max() * per_byte_s + costs.cluster.inter.latency_s
    assert oracle.restore_seconds(costs, static, flat) == pytest.approx(expected_s, rel=1e-9)
    # `node` runs two phases in sequence, each with the latency of its links.
    phased = costs.restore_bytes(static, node)
    intra = costs.cluster.intra
    expected_node_s = phased.intra_N.max() * (1 / intra.bytes_per_s + 4 / 1.5e12)
    expected_node_s += phased.inter_N.max() * per_byte_s
    expected_node_s += intra.latency_s + costs.cluster.inter.latency_s
    assert oracle.restore_seconds(costs, static, node) == pytest.approx(expected_node_s, rel=1e-9)
    assert expected_node_s < expected_s
    given_back = costs.reduce_bytes(static, flat)
    assert given_back.intra_N.sum() == received.intra_N.sum()
    assert oracle.reduce_seconds(costs, static, flat) == pytest.approx(expected_s, rel=1e-3)


@pytest.mark.parametrize("algorithm", list(ExchangeAlgorithm))
def test_one_changed_slot_of_equal_slices_costs_exactly_the_bound(algorithm: str) -> None:
    costs = make_costs(hidden=64, ffn=32, restore_algorithm=algorithm)
    geometry = Geometry(8, 8, 2, 4)
    before = ExpertLayout.static(8, 2, 8)
    slots = before.to_list()
    slots[5] = (slots[5] + 3) % 8
    after = Placed(ExpertLayout.from_slots(8, 2, 8, slots), geometry)
    least_s = costs.least_change_seconds(geometry)
    assert costs.change_seconds(before, after) == pytest.approx(least_s, rel=1e-8)


@pytest.mark.parametrize(
    ("factor", "recompute", "share"),
    [
        (1.0, Recompute.NONE, 1 / 3),
        (1.0, Recompute.FULL, 1 / 4),
        (1.5, Recompute.NONE, 1 / 4),
        (2.0, Recompute.FULL, 1 / 6),
        # Two thirds or two fifths of the experts, and half or a third of the All-to-Alls.
        (0.25, Recompute.NONE, 1 / 2),
        (0.25, Recompute.COMPUTE, 1 / 2.5),
        (0.25, Recompute.FULL, 1 / 3),
    ],
)
def test_the_part_of_a_layer_that_hides_a_restore_is_the_smaller_share_of_forward(
    factor: float, recompute: Recompute, share: float
) -> None:
    costs = make_costs(backward_gemm_factor=factor, recompute=recompute)
    assert costs.forward_share == pytest.approx(share)


def test_auto_takes_the_exchange_that_the_links_favour() -> None:
    def chosen(intra: float, node_size: int) -> str:
        costs = make_costs(
            hidden=4096, ffn=14336, intra=Link(intra, 1e-6), inter=Link(12.5e9, 2e-6)
        )
        return costs.with_exchange(Auto.AUTO, Geometry(32, 8, 2, node_size)).restore_algorithm

    assert chosen(300e9, 8) == "node"
    assert chosen(12.5e9, 8) == "flat"
    # With one node or nodes of one rank there is a single algorithm.
    assert chosen(300e9, 32) == chosen(300e9, 1) == "flat"


def test_bad_values_are_quoted() -> None:
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        make_costs(hidden=0)
    with pytest.raises(ValueError, match="'ring': must be one of flat, node"):
        make_costs(restore_algorithm=ExchangeAlgorithm("ring"))
    with pytest.raises(ValueError, match=r"bytes_per_s must be positive, got 0\.0"):
        Link(0.0, 0.0)
    counts_NE = np.ones((2, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="'odd': must be one of exact, even"):
        COSTS.layer_seconds(counts_NE, placed(ExpertLayout.static(2, 1, 2), 2), Split("odd"))
    with pytest.raises(ValueError, match=r"layout is for .* = \(2, 1, 2\), the planner for"):
        COSTS.change_seconds(ExpertLayout.static(2, 1, 2), placed(ExpertLayout.static(2, 2, 2)))
