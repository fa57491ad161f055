"""Layouts by pairs next to a strategy's: the price of both, and the order in which they are made.

Legend: N ranks, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.coactivation import counts_of, independent_sets, maps_of, priced, rows_and_balance
from benchmarks.token_exchange import Shape
from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Sharding, Split
from megatron_laer.planner.by_pairs import (
    _FITTED,
    WHOLE,
    Choice,
    PairPlanner,
    PlacedPairs,
)
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.crossings import hosts_of
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.pair_layouts import PairLayouts
from tests.traces import pairs_of

TOPICS = 8
SHAPE = Shape(nodes=4, node_size=2, experts=32, topk=4, tokens=0)


def planner(sharding: Sharding, interval: int = 1, split: Split = Split.EXACT) -> PairPlanner:
    geometry = Geometry(SHAPE.ranks, SHAPE.experts, 6, SHAPE.node_size, sharding, top_k=SHAPE.topk)
    costs = replace(priced(geometry, SHAPE), ffn=64)  # rows between nodes cost most
    return PairPlanner(geometry, costs, interval, split)


def routed(topical: bool) -> tuple[Int64, Int64, Int64, list[Bool]]:
    """Return pairs and counts of the first half of some tokens, and the second half's maps."""
    rng, experts_E = np.random.default_rng(1), np.arange(SHAPE.experts)
    likes_TE = rng.integers(TOPICS, size=8000)[:, None] == experts_E % TOPICS
    sets = np.argsort(-(3 * likes_TE + rng.gumbel(size=likes_TE.shape)), axis=1)[:, : SHAPE.topk]
    if not topical:
        sets = independent_sets(maps_of(sets, SHAPE), SHAPE, seed=1)
    first, second = np.split(sets, 2)
    maps = maps_of(first, SHAPE)
    return pairs_of(first, SHAPE.experts), counts_of(maps), second, maps_of(second, SHAPE)


def by_counts_of(planner: PairPlanner, counts_NE: Int64) -> ExpertLayout:
    geometry = planner.geometry
    return GreedyStrategy(geometry, planner.costs).plan(counts_NE, geometry.static_layout)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("sharding", Sharding)
def test_layouts_by_pairs_are_taken_where_tokens_have_topics_and_send_fewer_rows(
    sharding: Sharding, split: Split
) -> None:
    ours = planner(sharding, split=split)
    pairs_EE, counts_NE, _, later = routed(topical=True)
    by_counts = by_counts_of(ours, counts_NE)
    by_pairs = ours.place(pairs_EE, counts_NE, by_counts)
    assert by_pairs is not None
    ours.geometry.check_layout(by_pairs)
    choice = ours.choose(counts_NE, by_counts, by_pairs, pairs_EE)
    assert choice.layout == by_pairs
    rows, balance = zip(
        *(rows_and_balance(later, SHAPE, layout, SHAPE.topk) for layout in (by_counts, by_pairs)),
        strict=True,
    )
    assert rows[1] < (0.87 if sharding == Sharding.ROWS else 0.93) * rows[0]
    assert balance[1] < max(1.02, balance[0] + 0.02)
    crossings = ours.crossings(pairs_EE, counts_NE)
    expected = [crossings.rows(hosts_of(layout, ours.geometry)) for layout in (by_counts, by_pairs)]
    share = ours.price(counts_NE, by_pairs, expected[1] * _FITTED)[1]
    share /= ours.price(counts_NE, by_counts, expected[0])[1]
    assert choice.row_share == round(share * WHOLE) != WHOLE
    same = ours.choose(counts_NE * 1000, by_counts, by_pairs, pairs_EE)  # a forecast has no unit
    assert same.layout == choice.layout
    assert same.row_share == pytest.approx(choice.row_share, rel=1e-3)


def test_independent_choices_keep_the_layout_by_counts() -> None:
    ours = planner(Sharding.ROWS)
    pairs_EE, counts_NE, *_ = routed(topical=False)
    by_counts = by_counts_of(ours, counts_NE)
    by_pairs = place_together(pairs_EE, ours.geometry).layout
    assert ours.choose(counts_NE, by_counts, by_pairs, pairs_EE) == Choice(by_counts)


def test_a_layout_that_saves_rows_is_not_taken_where_a_rank_would_compute_longer() -> None:
    ours = planner(Sharding.ROWS)
    pairs_EE, counts_NE, *_ = routed(topical=True)
    by_counts = by_counts_of(ours, counts_NE)
    by_pairs = place_together(pairs_EE, ours.geometry).layout
    assert ours.choose(counts_NE, by_counts, by_pairs, pairs_EE).layout == by_pairs
    cluster = ours.costs.cluster
    gemm = cluster.gemm.times(1e-3)
    slow = replace(ours, costs=replace(ours.costs, cluster=replace(cluster, gemm=gemm)))
    hot_NE = counts_NE.copy()
    hot_NE[:, by_pairs.slot_expert_S[0]] *= 20
    hot = by_counts_of(slow, hot_NE)
    assert slow.choose(hot_NE, hot, by_pairs, pairs_EE).layout == hot


def test_no_pairs_and_no_layout_change_nothing() -> None:
    ours = planner(Sharding.ROWS)
    pairs_EE, counts_NE, *_ = routed(topical=True)
    by_counts = by_counts_of(ours, counts_NE)
    none_EE = np.zeros_like(pairs_EE)
    assert ours.place(none_EE, counts_NE, by_counts) is None
    assert ours.choose(counts_NE, by_counts, None, pairs_EE) == Choice(by_counts)
    assert ours.choose(counts_NE, by_counts, by_counts, pairs_EE) == Choice(by_counts)


def test_the_price_of_rows_is_that_of_pairs() -> None:
    """Twice the rows between nodes cost twice their seconds; all else is the cost model's."""
    ours = replace(planner(Sharding.ROWS), overlaps=False)
    pairs_EE, counts_NE, *_ = routed(topical=True)
    layout, crossings = by_counts_of(ours, counts_NE), ours.crossings(pairs_EE, counts_NE)
    rows = crossings.rows(hosts_of(layout, ours.geometry))
    seconds = [ours.price(counts_NE, layout, rows * times)[0] for times in (1, 2, 3)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0], rel=1e-6)
    share = ours.price(counts_NE, layout, rows)[1]
    scaled = ours.costs.tokens.with_rows(share)
    size, costs = SHAPE.node_size, replace(ours.costs, tokens=scaled)
    pairs = ours.costs.pairs_per_rank
    assert pairs is not None
    exact_NE = np.ceil(counts_NE * (pairs * SHAPE.ranks / counts_NE.sum())).astype(np.int64)
    layer_s = costs.split_seconds(ours._totals(exact_NE, layout), layout, size)
    whole_s = layer_s + costs.exchanges_seconds(layout, size, 0.0)
    assert seconds[0] == pytest.approx(whole_s, rel=1e-9)


def test_rows_are_no_fewer_than_the_pairs_that_quotas_send_off_their_node() -> None:
    """Every node has every expert, so tokens could stay; quotas send some away all the same."""
    geometry = Geometry(8, 16, 8, 2, top_k=2)
    shape = Shape(4, 2, 16, 2, 0)
    ours = PairPlanner(geometry, replace(priced(geometry, shape), ffn=64), 1)
    layout = ExpertLayout.from_slots(8, 8, 16, np.tile(np.arange(16, dtype=np.int16), 4))
    counts_NE = np.full((8, 16), 100, dtype=np.int64)
    counts_NE[0] *= 20  # a rank with most tokens, whose node must not compute them all
    pairs_EE = np.full((16, 16), counts_NE.sum() // 256) + np.eye(16, dtype=np.int64) * 10**4
    rows = ours.crossings(pairs_EE, counts_NE).rows(hosts_of(layout, geometry))
    assert rows == pytest.approx(0, abs=1e-9)
    _, share = ours.price(counts_NE, layout, rows)
    exact_NE = np.ceil(counts_NE * (ours.costs.pairs_per_rank * 8 / counts_NE.sum()))
    totals = ours._totals(exact_NE.astype(np.int64), layout)
    least = totals.far_S.sum() / 2 / ours.costs.tokens.sent_between_nodes(totals)
    assert share == pytest.approx(least) and least > 0
    other = geometry.random_layout((3,))
    for pair in ((layout, other), (other, layout)):
        choice = ours.choose(counts_NE, *pair, pairs_EE)
        assert WHOLE // 10 <= choice.row_share <= 10 * WHOLE


class Recorded(PairPlanner):
    """Planner whose layouts are made at once, for the order in which layers get them."""

    def place(
        self, pairs_EE: Int64, counts_NE: Int64, by_counts: ExpertLayout
    ) -> ExpertLayout | None:
        if pairs_EE[0, 0] == 13:
            raise RuntimeError("no thirteen")
        return self.geometry.random_layout((int(pairs_EE[0, 0]), int(counts_NE[0, 0])))


NUM_LAYERS, INTERVAL = 5, 2
LAYOUT = ExpertLayout.static(SHAPE.ranks, 6, SHAPE.experts)


def pairs(mark: int) -> Int64:
    experts = SHAPE.experts
    return np.full((NUM_LAYERS, experts, experts), mark, dtype=np.int64)


@pytest.fixture
def layouts() -> Iterator[PairLayouts]:
    ours = planner(Sharding.ROWS)
    recorded = Recorded(ours.geometry, ours.costs, INTERVAL)
    yield PairLayouts([recorded] * NUM_LAYERS)


def step(layouts: PairLayouts, number: int) -> list[str | None]:
    """Plan all layers of a step; return the problems of layouts that were due after it."""
    layouts.use_before(number)
    counts_NE = np.full((SHAPE.ranks, SHAPE.experts), 7, dtype=np.int64)
    for layer in range(NUM_LAYERS):
        layouts.faster(layer, counts_NE, LAYOUT)
    return [*layouts.place_due()]


def placed(layouts: PairLayouts) -> PlacedPairs:
    assert layouts.placed is not None
    return layouts.placed


def test_all_layers_have_layouts_before_the_next_pairs(layouts: PairLayouts) -> None:
    assert step(layouts, 0) == [], "there are no pairs yet"
    layouts.submit(0, pairs(1))
    assert step(layouts, 0) == [], "pairs of a step are for later ones"
    assert step(layouts, 1) == [None] * 3
    assert placed(layouts).waiting == (3, 4)
    assert [layout is not None for layout in placed(layouts).layouts] == [True] * 3 + [False] * 2
    assert step(layouts, 2) == [None] * 2
    assert placed(layouts).waiting == ()
    assert step(layouts, 3) == [], "layouts are kept"


def test_pairs_that_change_afterwards_change_no_plan(layouts: PairLayouts) -> None:
    counted_LEE = pairs(1)
    layouts.submit(0, counted_LEE)
    counted_LEE += 100
    layouts.use_before(1)
    assert (placed(layouts).pairs_LEE == 1).all()


def test_layers_that_waited_longest_come_first_with_newer_pairs(layouts: PairLayouts) -> None:
    layouts.submit(0, pairs(1))
    step(layouts, 1)
    layouts.submit(1, pairs(2))
    layouts.submit(2, pairs(3))
    before = placed(layouts).layouts
    layouts.use_before(3)
    assert placed(layouts).pairs_LEE[0, 0, 0] == 3
    assert placed(layouts).waiting == (3, 4, 0, 1, 2)
    assert placed(layouts).layouts == before, "older layouts are kept until then"


def test_a_layer_whose_placement_fails_keeps_what_it_has(layouts: PairLayouts) -> None:
    layouts.submit(0, pairs(1))
    step(layouts, 1)
    before = placed(layouts).layouts[0]
    layouts.submit(1, pairs(13))
    problems = step(layouts, 2) + step(layouts, 3)
    assert [problem for problem in problems if problem] == ["RuntimeError: no thirteen"] * 5
    assert placed(layouts).layouts[0] == before and placed(layouts).waiting == ()
    with pytest.raises(ValueError, match=r"step 4 has shape \(1, 32, 32\), expected"):
        layouts.submit(4, pairs(1)[:1])
