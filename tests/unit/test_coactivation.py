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
from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner import coactivation
from megatron_laer.planner.coactivation import Crossings, hosts_of, place_together
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.homes_file import read_homes, write_homes


def topic_sets(experts: int, top_k: int, tokens: int, topics: int, seed: int) -> Int64:
    """Draw each token's experts by the tastes of its topic, int64 [T, K]."""
    rng = np.random.default_rng(seed)
    taste_XE = 2.0 * rng.normal(size=(topics, experts))
    noisy_TE = taste_XE[rng.integers(topics, size=tokens)] + rng.gumbel(size=(tokens, experts))
    return np.argsort(-noisy_TE, axis=1)[:, :top_k]


def pairs_of(expert_TK: Int64, experts: int) -> Int64:
    chosen_TE = np.zeros((len(expert_TK), experts), dtype=np.int64)
    np.put_along_axis(chosen_TE, expert_TK, 1, axis=1)
    return chosen_TE.T @ chosen_TE


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "_STEPS", 800)


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

    placed = place_together(pairs_EE, geometry)
    assert placed.layout == place_together(pairs_EE, geometry).layout
    if sharding == Sharding.ROWS:
        geometry.check_layout(placed.layout)
        assert placed.home_slot_order_E.size == 0
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
def test_halves_of_eight_experts_are_within_a_hundredth_of_the_best(seed: int) -> None:
    geometry = Geometry(2, 8, 4, 1)
    crossings = Crossings(pairs_of(topic_sets(8, 3, 400, 2, seed), 8), 2)
    rng = np.random.default_rng(0)
    nodes = coactivation._Nodes.start(crossings, geometry, rng)
    nodes.anneal(rng)
    none_ME = np.zeros((2, 8), dtype=np.bool_)
    least = min(
        coactivation._Nodes(crossings, np.isin(np.arange(8), half).astype(int), none_ME).score()
        for half in combinations(range(8), 4)
    )
    assert least - 1e-9 <= nodes.score() <= 1.01 * least


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


@pytest.mark.parametrize("sharding", list(Sharding))
def test_sets_by_topic_cross_nodes_less_and_independent_ones_no_more(sharding: Sharding) -> None:
    shape = Shape(nodes=4, node_size=2, experts=32, topk=4, tokens=0)
    geometry = Geometry(shape.ranks, 32, 8, 2, sharding)
    found = benchmark.row_of(topic_sets(32, 4, 4000, 6, seed=5), shape, geometry, seed=1)
    assert found["saved"] > 0.1
    assert found["max/mean"] <= 1.01
    assert found["independent saved"] > -0.01


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
