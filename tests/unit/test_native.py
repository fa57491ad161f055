"""The native core: fresh layouts balance any counts, on every machine alike, without the GIL."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.costs import paper_costs
from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, PlanMode, Sharding
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.construct import always_balances, construct_layout
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from tests.costs import FREE, make_costs
from tests.oracles.exact import hosted_by_node, proportional_experts
from tests.unit.planner_cases import KINDS, any_counts, counts_of, geometries


def test_other_threads_run_while_it_solves() -> None:
    geometry = Geometry(1024, 1024, 2, 8)
    counts_NE = np.random.default_rng(0).integers(0, 100, (1024, 1024))
    greedy = GreedyStrategy(geometry, paper_costs())

    def ticks_beside_a_solve() -> int:
        arguments = (counts_NE, geometry.static_layout)
        solver = threading.Thread(target=greedy.plan, args=arguments)
        ticks = 0
        solver.start()
        while solver.is_alive():
            time.sleep(0.001)
            ticks += 1
        return ticks

    # With the GIL held, this thread would not run before the solve ends. On a busy machine it may
    # not run either, but not every time.
    assert any(ticks_beside_a_solve() >= 10 for _ in range(100))


@settings(max_examples=150)
@given(geometries(12, 20), st.integers(0, 2**16))
def test_replicas_in_proportion_equal_the_plain_reference(geometry: Geometry, seed: int) -> None:
    # The native planner takes them without costs where slots are not scarce.
    spare = geometry.num_slots - geometry.num_experts
    assume(spare >= 2 * geometry.num_ranks or not always_balances(geometry))
    counts_NE, node_size = any_counts(geometry, seed), geometry.node_size
    slots_S = native.greedy(counts_NE, geometry.static_layout.slot_expert_S, node_size, 0)

    # The native code moves ranks of a node, and slots of a rank, back to their earlier places.
    def by_node(experts: list[list[int]]) -> list[list[list[int]]]:
        nodes = range(0, geometry.num_ranks, node_size)
        return [sorted(experts[node : node + node_size]) for node in nodes]

    made = [sorted(held) for held in slots_S.reshape(-1, geometry.capacity).tolist()]
    assert by_node(made) == by_node(proportional_experts(counts_NE, geometry))


@settings(max_examples=150)
@given(geometries(12, 24), st.integers(0, 2**16))
def test_nodes_host_their_largest_experts_like_the_plain_reference(
    geometry: Geometry, seed: int
) -> None:
    num_ranks, capacity, num_experts = geometry.shape
    counts_NE, node_size = any_counts(geometry, seed), geometry.node_size
    most = min(num_experts, max(node_size * (capacity - 1), -(-num_experts // geometry.num_nodes)))
    slots_S = native.proportional_by_node(counts_NE, capacity, node_size, most)
    ExpertLayout(num_ranks, capacity, num_experts, slots_S.astype("<i2").tobytes())
    hosted = hosted_by_node(counts_NE, geometry, most)
    for made, wanted in zip(slots_S.reshape(geometry.num_nodes, -1).tolist(), hosted, strict=True):
        assert wanted <= set(made)
        # A rank takes another expert only if it already holds all of the node's.
        if len(wanted) >= capacity and counts_NE.sum() >= 4 * counts_NE.size:
            assert wanted == set(made)
    for experts_C in slots_S.reshape(num_ranks, capacity).tolist():
        assert len(set(experts_C)) == capacity


def test_counts_beyond_32_bits_are_exact() -> None:
    counts_NE = np.full((4, 4), 3 * 10**12, dtype=np.int64)
    counts_NE[:, 0] *= 5
    layout = construct_layout(counts_NE, ExpertLayout.static(4, 2, 4), 2)
    quotas = exact_split(layout, 2).solve(counts_NE)
    assert quotas.loads_S.sum() == counts_NE.sum()
    assert quotas.rank_loads_N().max() == counts_NE.sum() // 4


def test_known_layouts_stay_as_they_are_on_every_machine() -> None:
    # Golden digests; this loop prints them again if an algorithm changes on purpose.
    counts_NE = (np.arange(16 * 32).reshape(16, 32) * 7919) % 1009
    digests = {}
    for capacity in (3, 4, 6):
        geometry = Geometry(16, 32, capacity, 8)
        static = ExpertLayout.static(16, capacity, 32)
        digests[capacity] = (
            construct_layout(counts_NE, static, 8).digest,
            GreedyStrategy(geometry).plan(counts_NE, static).digest,
            GreedyStrategy(geometry, paper_costs()).plan(counts_NE, static).digest,
        )
    assert digests == {
        3: (2812499659646349188, -1228292041803928090, 2812499659646349188),
        4: (4297546431667611404, 6601285617979389404, 6601285617979389404),
        6: (-3384109150207657573, 3716978080227568637, 3716978080227568637),
    }


def test_known_layouts_of_homes_stay_as_they_are_on_every_machine() -> None:
    """Balance, a plan for drift, and the choice after the gate."""
    counts_NE = (np.arange(16 * 32).reshape(16, 32) * 7919) % 1009 * (1 + np.arange(32) % 5)
    digests = {}
    for capacity, node_size in ((3, 16), (3, 8), (5, 4)):
        geometry = Geometry(16, 32, capacity, node_size, Sharding.EXPERTS)
        costs = make_costs(intra=FREE, inter=Link(1e12, 0.0)).with_exchange(Auto.AUTO, geometry)
        static = geometry.static_layout
        digests[capacity, node_size] = (
            construct_layout(counts_NE, static, node_size, Sharding.EXPERTS).digest,
            GreedyStrategy(geometry, costs).plan(counts_NE, static).digest,
            Guard(PlanMode.EXACT, costs, geometry).decide(counts_NE, static).layout.digest,
        )
    assert digests == {
        (3, 16): (-9164800746618237989, -743869689201858970, -9164800746618237989),
        (3, 8): (-5190096014475730988, -4806334824033817483, -5190096014475730988),
        (5, 4): (6113471462026529630, 8595761366338102032, 5914639607241676653),
    }


@pytest.mark.parametrize(
    ("num_ranks", "capacity", "num_experts", "node_size"),
    [(1024, 8, 32, 8), (4096, 2, 512, 8), (512, 1, 1, 8), (256, 3, 300, 256), (1, 5, 5, 1)],
)
def test_large_and_odd_shapes_balance_perfectly(
    num_ranks: int, capacity: int, num_experts: int, node_size: int
) -> None:
    rng = np.random.default_rng(1)
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1))
    counts_NE = rng.multinomial(5000, share_E / share_E.sum(), size=num_ranks)
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    layout = construct_layout(counts_NE, static, node_size)
    quotas = exact_split(layout, node_size).solve(counts_NE)
    assert quotas.rank_loads_N().max() == 5000
    rank = num_ranks - 1
    assert quotas.rank_row(rank).sum() == 5000
    columns_NC = quotas.rank_columns(rank)
    own_S = quotas.loads_S[rank * capacity : (rank + 1) * capacity]
    assert (columns_NC.sum(axis=0) == own_S).all()


def largest_load(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> int:
    return int(exact_split(layout, node_size).solve(counts_NE).rank_loads_N().max())


def off_node_share(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> float:
    far_S = exact_split(layout, node_size).solve(counts_NE).totals().far_S
    return float(far_S.sum()) / max(int(counts_NE.sum()), 1)


def least_load(counts_NE: Int64) -> int:
    return int(-(-counts_NE.sum() // counts_NE.shape[0]))


@settings(max_examples=200)
@given(geometries(40, 64, balances=True), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_no_rank_carries_more_than_its_share_or_an_expert_twice(
    geometry: Geometry, kind: str, seed: int
) -> None:
    assert always_balances(geometry)
    counts_NE, node_size = counts_of(kind, geometry, seed), geometry.node_size
    layout = construct_layout(counts_NE, geometry.static_layout, node_size)
    geometry.check_layout(layout)
    assert largest_load(counts_NE, layout, node_size) == least_load(counts_NE)
    for rank in range(geometry.num_ranks):
        assert len(set(layout.experts_of(rank))) == geometry.capacity
    assert construct_layout(counts_NE, geometry.static_layout, node_size) == layout
    assert construct_layout(counts_NE, layout, node_size) is layout


@settings(max_examples=150)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**16))
def test_no_token_leaves_its_node_where_a_node_can_balance_itself(
    num_nodes: int, node_size: int, num_experts: int, seed: int
) -> None:
    capacity = min(num_experts, -(-num_experts // node_size) + 1)
    geometry = Geometry(num_nodes * node_size, num_experts, capacity, node_size)
    # Every rank has the same number of tokens, without a convenient divisor.
    counts_NE = counts_of("zipf", geometry, seed)
    layout = construct_layout(counts_NE, geometry.static_layout, node_size)
    assert off_node_share(counts_NE, layout, node_size) == 0
    assert largest_load(counts_NE, layout, node_size) == least_load(counts_NE)
