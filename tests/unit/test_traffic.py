"""Traffic of restores and gradient exchanges equals a message-by-message count, and is bounded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.hops import Link, way_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.planner.traffic import Traffic, reduce_traffic, restore_traffic
from tests.oracles.hops import Places, hops
from tests.placed import placed
from tests.unit.planner_cases import geometries, with_holes


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


def slots_of(places: Places, capacity: int) -> Int64:
    return places.place_X * capacity + places.at_X


def traffic_by_message(case: Case, algorithm: ExchangeAlgorithm, keep: bool = False) -> Traffic:
    layout, G = case.of.layout, case.of.geometry.node_size
    N, C = layout.num_ranks, layout.capacity
    changed_S = case.of.changed_S(case.before) if keep else case.changed_S
    held: dict[tuple[int, int], int] = {}  # (node, expert) → the slot that has it
    if keep and G < N:
        for hop in hops(case.of, way_of(case.of.geometry, ExchangeAlgorithm.NODE), case.before):
            if hop.is_kept:
                for node, slot in zip(hop.target.place_X, slots_of(hop.source, C), strict=True):
                    assert slot // C // G == node
                    held[int(node), int(case.before.replica_expert_S[slot])] = int(slot)
    sent: dict[tuple[int, int], int] = defaultdict(int)  # (from, to) → elements
    for rows, columns in case.matrices:
        bounds = row_bounds(rows, N)
        block_N = [(bounds[n + 1] - bounds[n]) * columns for n in range(N)]
        wanted = {
            rank: [
                int(layout.slot_expert_S[slot])
                for slot in range(rank * C, rank * C + C)
                if changed_S[slot] and layout.slot_expert_S[slot] != EMPTY
            ]
            for rank in range(N)
        }
        for to in range(N):
            if algorithm == ExchangeAlgorithm.FLAT:
                for source in range(N):
                    sent[source, to] += len(wanted[to]) * block_N[source]
                continue
            node = range(to // G * G, to // G * G + G)
            distinct = {expert for rank in node for expert in wanted[rank]}
            before_S = case.before.replica_expert_S.reshape(N // G, -1)[to // G]
            have = set(before_S.tolist()) if keep and G < N else set()
            assert {e for node, e in held if node == to // G} == distinct & have
            for source in range(to % G, N, G):
                sent[source, to] += len(distinct - have) * block_N[source]
            for expert in distinct & have:
                to_rows = sum(block_N[n] for n in range(to % G, N, G))
                sent[held[to // G, expert] // C, to] += to_rows
            for helper in node:
                place_rows = sum(block_N[n] for n in range(helper % G, N, G))
                if helper != to:
                    sent[helper, to] += len(wanted[to]) * place_rows

    counted = Traffic(*np.zeros((4, N), dtype=np.int64))
    for (source, to), elements in sent.items():
        if source == to:
            continue
        near = source // G == to // G
        (counted.intra_N if near else counted.inter_N)[to] += elements
        (counted.sent_intra_N if near else counted.sent_inter_N)[source] += elements
    return counted


def assert_equal(a: Traffic, b: Traffic) -> None:
    for name in ("intra_N", "inter_N", "sent_intra_N", "sent_inter_N"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=80)
@given(cases(max_ranks=12), st.sampled_from(list(ExchangeAlgorithm)))
def test_the_formulas_equal_a_count_message_by_message(
    case: Case, algorithm: ExchangeAlgorithm
) -> None:
    of = case.of, case.matrices, algorithm
    assert_equal(restore_traffic(*of, case.changed_S), traffic_by_message(case, algorithm))
    assert (case.of.replica_expert_S[case.of.changed_S(case.before)] != EMPTY).all()
    kept = traffic_by_message(case, algorithm, keep=True)
    assert_equal(restore_traffic(*of, before=case.before), kept)
    # Gradients travel as a full restore backwards.
    case.changed_S[:] = True
    there = traffic_by_message(case, algorithm)
    back = Traffic(there.sent_intra_N, there.sent_inter_N, there.intra_N, there.inter_N)
    assert_equal(reduce_traffic(*of), back)


def per_node(elements_N: np.ndarray, node_size: int) -> np.ndarray:
    return elements_N.reshape(-1, node_size).sum(axis=1)


@settings(max_examples=100)
@given(cases(max_ranks=1024))
def test_no_node_receives_or_sends_more_across_nodes_than_flat(case: Case) -> None:
    for keep in ({"changed_S": case.changed_S}, {"before": case.before}, {}):
        flat, node = (
            restore_traffic(case.of, case.matrices, algorithm, **keep)  # type: ignore[arg-type]
            for algorithm in ExchangeAlgorithm
        )
        for name in ("inter_N", "sent_inter_N"):
            by_node, by_flat = (
                per_node(getattr(traffic, name), case.of.geometry.node_size)
                for traffic in (node, flat)
            )
            assert (by_node <= by_flat).all(), (name, keep)


@settings(max_examples=100)
@given(cases(max_ranks=1024, even_rows=True))
def test_no_rank_receives_or_sends_more_across_nodes_where_rows_are_even(case: Case) -> None:
    for formula in (restore_traffic, reduce_traffic):
        flat, node = (formula(case.of, case.matrices, algorithm) for algorithm in ExchangeAlgorithm)
        assert (node.inter_N <= flat.inter_N).all()
        assert (node.sent_inter_N <= flat.sent_inter_N).all()


def test_seconds_follow_the_slower_direction_of_the_slowest_rank() -> None:
    elements = np.array([[10, 0], [0, 6], [0, 4], [8, 0]])
    # Rank 0: 10 received inside, 8 sent across. Rank 1: 4 sent inside, 6 received across.
    by_node = Traffic(*elements, (Link.BETWEEN, Link.INSIDE))
    assert by_node.seconds(2, 10.0, 4.0) == pytest.approx(2 * 10 / 10 + 2 * 8 / 4)
    assert Traffic(*elements).seconds(2, 10.0, 4.0) == pytest.approx(2 * 8 / 4)


def test_wrong_arguments_are_refused_with_what_works() -> None:
    layout = ExpertLayout.static(4, 2, 4)
    with pytest.raises(ValueError, match=r"'tree'.*flat, node"):
        restore_traffic(placed(layout, 2), [(8, 8)], ExchangeAlgorithm("tree"))
    with pytest.raises(ValueError, match=r"expected \(8,\)"):
        restore_traffic(placed(layout, 2), [(8, 8)], "node", np.ones(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="different"):
        layout.changed_from(ExpertLayout.static(4, 3, 4))


def test_ranks_that_hold_the_same_experts_hand_out_equally_many() -> None:
    before = placed(ExpertLayout.static(8, 8, 8), 4)
    after_S = (before.layout.slot_expert_S.reshape(8, 8) + 1) % 8
    after = placed(ExpertLayout.from_slots(8, 8, 8, after_S.reshape(-1)), 4)
    way = way_of(after.geometry, ExchangeAlgorithm.NODE)
    fetched, kept, _ = hops(after, way, before)
    assert kept.is_kept and len(fetched.target.place_X) == 0
    assert np.bincount(kept.source.place_X, minlength=8).tolist() == [2] * 8
