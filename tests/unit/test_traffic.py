"""Traffic of restores and gradient exchanges adds up, and is bounded across nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Bool
from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Link, way_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.traffic import Traffic, reduce_traffic, restore_traffic
from tests.placed import placed
from tests.unit.planner_cases import geometries, with_holes

FLAT, NODE = ExchangeAlgorithm.FLAT, ExchangeAlgorithm.NODE


@dataclass
class Case:
    of: Placed
    matrices: list[tuple[int, int]]
    changed_S: Bool
    before: Placed


@st.composite
def cases(draw: st.DrawFn, max_ranks: int, even_rows: bool = False) -> Case:
    """Draw layouts of any N, C, E and G, and two matrices, also with fewer rows than ranks."""
    geometry, seed = draw(geometries(max_ranks, 64)), draw(st.integers(0, 2**16))
    full = ExpertLayout.random(*geometry.shape, seed=(seed,))
    # Where rows are even, all ranks are to fetch equally many slots.
    holes = 0.0 if even_rows else draw(st.sampled_from([0.0, 0.3, 1.0]))
    layout = with_holes(full, holes, seed)
    unit = geometry.num_ranks if even_rows else 1
    matrices = [(unit * draw(st.integers(1, 70)), draw(st.integers(1, 5))) for _ in range(2)]
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    changed_S = np.random.default_rng(seed).random(layout.num_slots) < share
    # The earlier layout has some experts in other places.
    before_S = full.slot_expert_S.copy()
    before_S[changed_S] = np.random.default_rng(seed + 1).permutation(before_S[changed_S])
    before = ExpertLayout.from_slots(*geometry.shape, before_S)
    before = with_holes(before, draw(st.sampled_from([0.0, 0.3])), seed + 2)
    return Case(Placed(layout, geometry), matrices, changed_S, Placed(before, geometry))


ELEMENTS = "intra_N", "inter_N", "sent_intra_N", "sent_inter_N"


def assert_equal(a: Traffic, b: Traffic) -> None:
    for name in ELEMENTS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=80)
@given(cases(max_ranks=24), st.sampled_from(list(ExchangeAlgorithm)), st.integers(0, 2**16))
def test_traffic_is_that_of_its_slots_and_matrices_and_gradients_travel_backwards(
    case: Case, algorithm: ExchangeAlgorithm, seed: int
) -> None:
    """Slots that are not fetched count as empty ones; `test_exchange.py` counts real bytes."""
    some, way = with_holes(case.of.layout, 0.5, seed), way_of(case.of.geometry, algorithm)
    found = restore_traffic(case.of, case.matrices, way, some.slot_expert_S != EMPTY)
    assert_equal(found, restore_traffic(Placed(some, case.of.geometry), case.matrices, way))
    one, other = ([matrix] for matrix in case.matrices)
    whole = restore_traffic(case.of, [*one, *other], way)
    parts = [restore_traffic(case.of, matrix, way) for matrix in (one, other)]
    for name in ELEMENTS:
        elements_N = sum(getattr(part, name) for part in parts)
        np.testing.assert_array_equal(getattr(whole, name), elements_N)
    assert_equal(reduce_traffic(case.of, case.matrices, way), whole.reversed())


@settings(max_examples=200)
@given(cases(max_ranks=1024) | cases(max_ranks=1024, even_rows=True))
def test_no_node_exchanges_more_across_nodes_than_flat_and_no_rank_where_rows_are_even(
    case: Case,
) -> None:
    num_ranks, node_size = case.of.geometry.num_ranks, case.of.geometry.node_size
    is_full = (case.of.layout.slot_expert_S != EMPTY).all()
    formulas: list[Callable[..., Traffic]] = [
        partial(restore_traffic, changed_S=case.changed_S),
        partial(restore_traffic, before=case.before),
        restore_traffic,
        reduce_traffic,
    ]
    for at, formula in enumerate(formulas):
        ways = (way_of(case.of.geometry, of) for of in (FLAT, NODE))
        flat, node = (formula(case.of, case.matrices, way) for way in ways)
        # Then all ranks fetch equally many slots.
        is_even = at >= 2 and is_full and all(rows % num_ranks == 0 for rows, _ in case.matrices)
        for name in ("inter_N", "sent_inter_N"):
            by_node, by_flat = (
                getattr(traffic, name).reshape(-1, 1 if is_even else node_size).sum(axis=1)
                for traffic in (node, flat)
            )
            assert (by_node <= by_flat).all(), (name, at)


def test_ranks_of_a_node_hand_out_what_it_kept_in_turn() -> None:
    """One rank of five lacks the experts that each of the others has."""
    geometry, experts = Geometry(10, 4, 4, 5), [0, 1, 2, 3]
    before, after = (
        Placed(
            ExpertLayout.from_slots(*geometry.shape, experts * 4 + fifth + experts * 5), geometry
        )
        for fifth in ([EMPTY] * 4, experts)
    )
    way = way_of(geometry, NODE)
    sent_N = restore_traffic(after, [(10, 1)], way, before=before).sent_intra_N
    assert len({*sent_N[:4].tolist()}) == 1 and sent_N[0] > 0 == sent_N[5:].sum()


def test_slots_that_change_to_an_expert_are_fetched_and_emptied_ones_are_not() -> None:
    before, after = (
        placed(ExpertLayout.from_slots(2, 3, 3, slots))
        for slots in ([0, 1, 2, 0, 1, 2], [0, 1, EMPTY, 2, 1, EMPTY])
    )
    assert after.changed_S(before).nonzero()[0].tolist() == [3]


def test_wrong_arguments_are_refused_with_what_works() -> None:
    layout = ExpertLayout.static(4, 2, 4)
    of = placed(layout, 2)
    with pytest.raises(ValueError, match=r"expected \(8,\)"):
        way = way_of(of.geometry, NODE)
        restore_traffic(of, [(8, 8)], way, np.ones(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="different"):
        layout.changed_from(ExpertLayout.static(4, 3, 4))


@given(geometries(64, 64))
def test_a_hop_links_a_rank_to_its_node_or_to_those_in_its_place_of_others(
    geometry: Geometry,
) -> None:
    rank, node_size = geometry.num_ranks - 1, geometry.node_size
    near = [other for other in range(rank) if other // node_size == rank // node_size]
    far = [other for other in range(rank) if other not in near]
    in_place = [other for other in far if other % node_size == rank % node_size]
    assert Link.ALL.peers(geometry) == (len(near), len(far))
    assert Link.BETWEEN.peers(geometry) == (0, len(in_place))
    assert Link.INSIDE.peers(geometry) == (len(near), 0)
