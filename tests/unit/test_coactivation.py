"""Layouts by pairs of experts: legal, near the best of small cases, with fewer rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import coactivation as benchmark
from benchmarks.token_exchange import Shape
from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner import coactivation
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.crossings import Crossings, hosts_of
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.homes_file import read_homes, write_homes
from tests.traces import pairs_of


def topic_sets(experts: int, top_k: int, tokens: int, topics: int, seed: int) -> Int64:
    """Draw each token's experts by the tastes of its topic, int64 [T, K]."""
    rng = np.random.default_rng(seed)
    taste_XE = 2.0 * rng.normal(size=(topics, experts))
    noisy_TE = taste_XE[rng.integers(topics, size=tokens)] + rng.gumbel(size=(tokens, experts))
    return np.argsort(-noisy_TE, axis=1)[:, :top_k]


def node_counts(counts_NE: Int64 | None, node_size: int) -> Int64 | None:
    if counts_NE is None:
        return None
    return counts_NE.reshape(-1, node_size, counts_NE.shape[1]).sum(axis=1)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "_STEPS_PER_SLOT", 20)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_layouts_are_legal_and_repeatable(data: st.DataObject) -> None:
    nodes, size = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (3, 2)]))
    at_home = data.draw(st.booleans())
    ranks = nodes * size
    experts = ranks * data.draw(st.integers(1, 3)) + (
        0 if at_home else data.draw(st.integers(0, 3))
    )
    fewest = -(-experts // ranks) + at_home
    capacity = data.draw(st.integers(min(fewest, experts), experts))
    sharding = Sharding.EXPERTS if at_home and experts > ranks else Sharding.ROWS
    geometry = Geometry(ranks, experts, capacity, size, sharding)
    seed = data.draw(st.integers(0, 2**16))
    top_k = data.draw(st.integers(1, experts))
    pairs_EE = pairs_of(topic_sets(experts, top_k, 50, 3, seed), experts)

    counts_NE = None
    if data.draw(st.booleans()):
        counts_NE = np.random.default_rng(seed).integers(0, 50, (ranks, experts))
    placed = place_together(pairs_EE, geometry, counts_NE)
    assert placed.layout == place_together(pairs_EE, geometry, counts_NE).layout
    crossings = Crossings(pairs_EE, nodes, node_counts(counts_NE, size))
    assert placed.rows_per_token == pytest.approx(crossings.rows(hosts_of(placed.layout, geometry)))
    if sharding == Sharding.ROWS:
        geometry.check_layout(placed.layout)
        assert placed.home_slot_order_E.shape == (0,)
        assert placed.home_slot_order_E.dtype == np.int64
        return
    homes = HomeOrder(placed.home_slot_order_E)
    geometry.check_layout(homes.layout_of_positions(placed.layout))


def test_homes_go_into_a_file_for_training(tmp_path: Path) -> None:
    geometry = Geometry(4, 8, 3, 2, Sharding.EXPERTS)
    placed = place_together(pairs_of(topic_sets(8, 2, 300, 3, seed=0), 8), geometry)
    write_homes(tmp_path / "homes.json", 4, {"layer 1": placed.home_slot_order_E})
    homes = read_homes(tmp_path / "homes.json").by_layer["layer 1"]
    np.testing.assert_array_equal(homes.expert_E, placed.home_slot_order_E)


@pytest.mark.parametrize("seed", range(6))
def test_halves_of_eight_experts_are_within_a_hundredth_of_the_best(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows and uneven loads of nodes; balance under drift is another matter."""
    monkeypatch.setattr(coactivation, "_STEPS_PER_SLOT", 200)
    monkeypatch.setattr(coactivation, "_REPAIRS", 0)
    crossings = Crossings(pairs_of(topic_sets(8, 3, 400, 2, seed), 8), 2)

    def score(hosts_ME: Bool) -> float:
        load_M = hosts_ME @ crossings.pairs_EE.diagonal()
        uneven_M = np.abs(load_M / load_M.mean() - 1) - 0.03
        return crossings.rows(hosts_ME) + float(np.maximum(uneven_M, 0).sum())

    geometry = Geometry(2, 8, 4, 1)
    found = score(hosts_of(place_together(crossings.pairs_EE, geometry).layout, geometry))
    halves = [np.isin(np.arange(8), half) for half in combinations(range(8), 4)]
    least = min(score(np.stack([half_E, ~half_E])) for half_E in halves)
    assert least - 1e-9 <= found <= 1.01 * least


@pytest.mark.parametrize("capacity", [4, 6])
def test_expected_rows_are_near_those_of_the_tokens(capacity: int) -> None:
    geometry = Geometry(8, 32, capacity, 2)
    expert_TK = topic_sets(32, 4, 4000, 6, seed=3)
    layout = place_together(pairs_of(expert_TK, 32), geometry).layout
    hosts_ME = hosts_of(layout, geometry)
    single_ME = hosts_ME & (hosts_ME.sum(axis=0) == 1)
    visits_TM = single_ME[:, expert_TK].any(axis=2).T
    rows = 0.75 * float(visits_TM.sum(axis=1).mean())
    expected = Crossings(pairs_of(expert_TK, 32), 4).rows(single_ME)
    assert expected == pytest.approx(rows, rel=0.08)


def test_ranks_of_a_node_have_alike_loads_that_no_split_can_move() -> None:
    """A later load can then grow on any of them: such a rank would be too busy under each split."""
    geometry = Geometry(8, 64, 12, 2)
    differences = []
    for seed in range(4):
        pairs_EE = pairs_of(topic_sets(64, 4, 4000, 12, seed), 64)
        layout = place_together(pairs_EE, geometry).layout
        holds_NE = np.stack([layout.slot_expert_S.reshape(8, -1) == e for e in range(64)]).any(2).T
        fixed_N = (holds_NE & (holds_NE.sum(axis=0) == 1)) @ pairs_EE.diagonal()
        differences.append(np.abs(fixed_N[::2] - fixed_N[1::2]) * 8 / pairs_EE.trace())
    assert np.mean(differences) < 0.08


@pytest.mark.parametrize("known", [False, True])
def test_rows_are_those_of_tokens_without_likeness(known: bool) -> None:
    """Tokens use their own node, else one that they need anyway, as a loop over tokens counts."""
    rng = np.random.default_rng(0)
    hosts_ME = np.zeros((4, 32), dtype=np.bool_)
    hosts_ME[rng.integers(4, size=32), np.arange(32)] = True
    hosts_ME[rng.integers(4, size=8), np.arange(8)] = True  # some have a second node
    tilt_ME = rng.normal(size=(4, 32)) if known else np.zeros((4, 32))
    sets = [
        np.argsort(-(tilt_E + rng.gumbel(size=(4000, 32))), axis=1)[:, :3] for tilt_E in tilt_ME
    ]
    rows = 0
    for source, expert_TK in enumerate(sets):
        for experts in expert_TK.tolist():
            held = [set(np.flatnonzero(hosts_ME[:, expert]).tolist()) for expert in experts]
            nodes = {source}.union(*(of for of in held if len(of) == 1))
            rows += len(nodes) - 1 + sum(not of & nodes for of in held)
    counts_ME = np.stack([np.bincount(one_TK.ravel(), minlength=32) for one_TK in sets])
    crossings = Crossings(pairs_of(np.concatenate(sets), 32), 4, counts_ME if known else None)
    assert crossings.rows(hosts_ME) == pytest.approx(rows / 16000, rel=0.02)


def test_ranks_of_few_topics_have_other_layouts() -> None:
    """Tokens of half the experts on one node, and of the other half on the other, need no rows."""
    geometry = Geometry(2, 8, 5, 1)
    halves = [
        np.argsort(np.random.default_rng(at).random((300, 4)), axis=1)[:, :2] for at in (0, 1)
    ]
    pairs_EE = pairs_of(np.concatenate([halves[0], 4 + halves[1]]), 8)
    counts_NE = np.zeros((2, 8), dtype=np.int64)
    counts_NE[1, :4], counts_NE[0, 4:] = pairs_EE.diagonal()[:4], pairs_EE.diagonal()[4:]
    hosts_ME = hosts_of(place_together(pairs_EE, geometry, counts_NE).layout, geometry)
    assert hosts_ME[1, :4].all()
    assert hosts_ME[0, 4:].all()


def test_the_layout_by_counts_is_taken_where_it_sends_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any search, the layout by pairs may be worse."""
    geometry = Geometry(4, 16, 8, 2, Sharding.EXPERTS)
    pairs_EE = pairs_of(np.arange(16).reshape(4, 4).repeat(50, axis=0), 16)
    monkeypatch.setattr(
        coactivation.native, "together", lambda *_: (np.tile(np.arange(8, dtype=np.int16), 4), 3.0)
    )
    placed = place_together(pairs_EE, geometry)
    assert placed.rows_per_token < 3
    np.testing.assert_array_equal(placed.home_slot_order_E, np.arange(16))
    geometry.check_layout(placed.layout)


@pytest.mark.parametrize("sharding", list(Sharding))
def test_sets_by_topic_cross_nodes_less_and_independent_ones_no_more(sharding: Sharding) -> None:
    shape = Shape(nodes=4, node_size=2, experts=32, topk=4, tokens=0)
    geometry = Geometry(shape.ranks, 32, 8, 2, sharding)
    expert_TK = topic_sets(32, 4, 4000, 6, seed=5)
    first, second = (benchmark.maps_of(expert_TK[at::2], shape) for at in range(2))
    planned = benchmark.planned(first, shape, geometry)
    found = planned.saved(second, shape)
    assert found["saved"] > 0.1
    assert found["max/mean"] <= 1.01
    drawn = benchmark.maps_of(benchmark.independent_sets(second, shape, 1), shape)
    independent = planned.saved_on_independent(drawn, shape)
    assert independent["saved by both"] > -0.01
    line = benchmark.on_independent_draws(independent)
    assert f"{independent['saved by quotas']:.1%} with today's layouts" in line


@pytest.mark.parametrize("routing", list(benchmark.ROUTINGS))
def test_layouts_by_pairs_save_rows_of_every_routing_by_seed(routing: str) -> None:
    shape = Shape(nodes=4, node_size=4, experts=64, topk=8, tokens=512)
    geometry = Geometry(shape.ranks, 64, 8, 4)
    maps = benchmark.topic_maps(shape, routing, seed=0)
    first, second = ([map_TE[at::2] for map_TE in maps] for at in range(2))
    found = benchmark.planned(first, shape, geometry, knows_ranks=True).saved(second, shape)
    assert found["saved"] > 0.27
    assert found["max/mean"] <= 1.01


def test_drifted_loads_follow_pairs() -> None:
    """Experts that tokens always choose together keep equal shares of a drift by topics."""
    pairs_EE = np.array([[9, 9, 0, 0], [9, 9, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]])
    ratios = []
    for load_E in coactivation.drifted_loads(pairs_EE, 4, np.random.default_rng(0))[1:]:
        ratios.append(np.log(load_E[:2].sum() / load_E[2:].sum()))
        assert load_E.sum() == pytest.approx(8000, abs=4)
    assert np.std(ratios) > 0.1


@pytest.mark.parametrize(
    ("pairs_EE", "message"),
    [
        (np.ones((2, 3), np.int64), "no table of pairs"),
        (np.array([[2, 1], [0, 2]]), "no table of pairs"),
        (np.array([[1, 2], [2, 3]]), "expert 0 is in 2 tokens of a pair, but has 1 tokens"),
    ],
)
def test_tables_that_count_no_pairs_are_refused(pairs_EE: Int64, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Crossings(pairs_EE, 2)


def test_pairs_of_another_model_are_refused() -> None:
    geometry = Geometry(2, 8, 4, 1)
    with pytest.raises(ValueError, match="planner is for 8 experts"):
        place_together(np.eye(4, dtype=np.int64), geometry)
    assert replace(geometry, top_k=2).top_k == 2


def test_the_benchmark_draws_sets_with_the_loads_of_the_second_half() -> None:
    shape = Shape(nodes=2, node_size=1, experts=8, topk=3, tokens=0)
    maps = benchmark.maps_of(topic_sets(8, 3, 2000, 2, seed=1), shape)
    drawn_TK = benchmark.independent_sets(maps, shape, seed=0)
    assert all(len(set(experts)) == 3 for experts in drawn_TK.tolist())
    wanted_E = benchmark.counts_of(maps).sum(axis=0)
    np.testing.assert_allclose(np.bincount(drawn_TK.ravel(), minlength=8), wanted_E, rtol=0.15)
