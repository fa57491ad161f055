"""Homes by pairs of experts: legal, near the best of small cases, with fewer rows.

Legend: T tokens, E experts, K top-k, M nodes.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.planner import coactivation
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.crossings import Crossings
from megatron_laer.planner.geometry import Geometry
from tests.traces import pairs_of


def topic_sets(experts: int, top_k: int, tokens: int, topics: int, seed: int) -> Int64:
    """Draw each token's experts by the tastes of its topic, int64 [T, K]."""
    rng = np.random.default_rng(seed)
    taste_XE = 2.0 * rng.normal(size=(topics, experts))
    noisy_TE = taste_XE[rng.integers(topics, size=tokens)] + rng.gumbel(size=(tokens, experts))
    return np.argsort(-noisy_TE, axis=1)[:, :top_k]


def nodes_of(order_E: Int64, nodes: int) -> Int64:
    """Return the home node of each expert."""
    return np.argsort(order_E) * nodes // len(order_E)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "_STEPS", 20)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_homes_are_a_permutation_and_repeatable(data: st.DataObject) -> None:
    nodes, size = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (3, 2)]))
    ranks = nodes * size
    experts = ranks * data.draw(st.integers(1, 3))
    geometry = Geometry(ranks, experts, experts // ranks, size)
    top_k = data.draw(st.integers(1, experts))
    sets_TK = topic_sets(experts, top_k, 50, 3, seed=data.draw(st.integers(0, 2**16)))
    pairs_EE = pairs_of(sets_TK, experts)
    order_E = place_together(pairs_EE, geometry)
    assert order_E.dtype == np.int64 and sorted(order_E.tolist()) == [*range(experts)]
    assert place_together(pairs_EE, geometry).tolist() == order_E.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_halves_of_eight_experts_are_within_a_hundredth_of_the_best(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows and uneven loads of nodes."""
    monkeypatch.setattr(coactivation, "_STEPS", 200)
    crossings = Crossings(pairs_of(topic_sets(8, 3, 400, 2, seed), 8))

    def score(node_E: Int64) -> float:
        load_M = np.bincount(node_E, weights=crossings.pairs_EE.diagonal())
        uneven_M = np.abs(load_M / load_M.mean() - 1) - 0.03
        return crossings.rows(node_E, 2) + float(np.maximum(uneven_M, 0).sum())

    found = score(nodes_of(place_together(crossings.pairs_EE, Geometry(2, 8, 4, 1)), 2))
    halves = [np.isin(np.arange(8), half) for half in combinations(range(8), 4)]
    least = min(score(half_E.astype(np.int64)) for half_E in halves)
    assert least - 1e-9 <= found <= 1.01 * least


def test_homes_by_topic_send_fewer_rows_than_stocks_as_many_as_expected() -> None:
    expert_TK = topic_sets(32, 4, 8000, 6, seed=3)
    first, second = expert_TK[::2], expert_TK[1::2]
    order_E = place_together(pairs_of(first, 32), Geometry(8, 32, 4, 2))
    stock_E, found_E = nodes_of(np.arange(32), 4), nodes_of(order_E, 4)
    rows, stock_rows = (
        0.75 * float((node_E[second, None] == np.arange(4)).any(axis=1).sum(axis=1).mean())
        for node_E in (found_E, stock_E)
    )
    assert rows < 0.92 * stock_rows
    expected = Crossings(pairs_of(first, 32)).rows(found_E, 4)
    assert expected == pytest.approx(rows, rel=0.08)


def test_ranks_of_a_node_have_alike_loads() -> None:
    differences = []
    for seed in range(4):
        pairs_EE = pairs_of(topic_sets(64, 4, 4000, 12, seed), 64)
        order_E = place_together(pairs_EE, Geometry(8, 64, 8, 2))
        load_N = pairs_EE.diagonal()[order_E].reshape(8, -1).sum(axis=1)
        differences.append(np.abs(load_N[::2] - load_N[1::2]) * 8 / pairs_EE.trace())
    assert np.mean(differences) < 0.08


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
        Crossings(pairs_EE)


def test_pairs_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="planner is for 8 experts"):
        place_together(np.eye(4, dtype=np.int64), Geometry(2, 8, 4, 1))
