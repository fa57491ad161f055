"""Exact quotas that count on tokens which visit a node anyway: legal, balanced, fewer rows."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.token_exchange import Case, Shape, routing_maps
from benchmarks.token_traffic import dispatch_rows
from megatron_laer.arrays import Int64
from megatron_laer.choices import Split, TokenExchange
from megatron_laer.config import PlanMode
from megatron_laer.planner.exact import ExactQuotas, exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from tests.costs import make_costs
from tests.unit.planner_cases import KINDS, counts_of, geometries, shape_of, with_holes

_SHARE_UNITS = 1024


@settings(max_examples=100)
@given(st.data())
def test_the_quotas_equal_a_definition_token_by_token(data: st.DataObject) -> None:
    geometry, seed = data.draw(geometries(12, 16, 3)), data.draw(st.integers(0, 2**16))
    layout = ExpertLayout.random(*shape_of(geometry), seed=(seed,))
    layout = with_holes(layout, (seed % 3) / 2, seed)
    counts_NE = counts_of(data.draw(st.sampled_from(KINDS)), geometry, seed) % 500
    top_k = data.draw(st.integers(1, geometry.num_experts))
    quotas = exact_split(layout, geometry.node_size, top_k).solve(counts_NE)

    plain = exact_split(layout, geometry.node_size).solve(counts_NE)
    assert quotas.rank_loads_N().max() == plain.rank_loads_N().max()
    rows_NS = np.stack([quotas.rank_row(rank) for rank in range(layout.num_ranks)])
    columns_NNC = np.stack([quotas.rank_columns(rank) for rank in range(layout.num_ranks)])
    np.testing.assert_array_equal(rows_NS, columns_NNC.transpose(1, 0, 2).reshape(rows_NS.shape))
    np.testing.assert_array_equal(rows_NS.sum(axis=0), quotas.loads_S)
    held_SE = layout.slot_expert_S[:, None] == np.arange(layout.num_experts)
    np.testing.assert_array_equal(rows_NS @ held_SE, counts_NE)
    np.testing.assert_array_equal(rows_NS, defined_NS(quotas))
    totals = quotas.totals()
    node_N = np.arange(layout.num_ranks) // geometry.node_size
    is_near_NS = node_N[:, None] == np.repeat(node_N, layout.capacity)
    np.testing.assert_array_equal(totals.near_S, (rows_NS * is_near_NS).sum(axis=0))
    np.testing.assert_array_equal(totals.far_S, (rows_NS * ~is_near_NS).sum(axis=0))
    sent_near_N, sent_far_N = ((rows_NS * at).sum(axis=1) for at in (is_near_NS, ~is_near_NS))
    np.testing.assert_array_equal(totals.sent_near_N + totals.sent_far_N, counts_NE.sum(axis=1))
    for sent_N, expected_N in ((totals.sent_near_N, sent_near_N), (totals.sent_far_N, sent_far_N)):
        np.testing.assert_array_equal(of_nodes(sent_N, node_N), of_nodes(expected_N, node_N))


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_tokens_choose_replicas_with_fewer_rows(skew: float) -> None:
    shape = Shape(nodes=4, node_size=4, experts=64, topk=6, tokens=256)
    maps = routing_maps(shape, skew, seed=1)
    geometry = Geometry(shape.ranks, shape.experts, 6, shape.node_size)
    counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
    layout = GreedyStrategy(geometry).plan(counts_NE, geometry.static_layout)
    rows, balance = [], []
    for top_k in (0, shape.topk):
        case = Case.of(maps, shape, layout, Split.EXACT, top_k)
        sent = dispatch_rows(case.count(chooses=True), TokenExchange.NODE)
        rows.append(int(sent.inter_N.sum()))
        balance.append(case.max_over_mean)
    assert rows[1] < rows[0]
    assert balance[1] == balance[0]


def test_the_guard_decides_on_the_same_quotas() -> None:
    geometry = Geometry(8, 16, 4, 2, top_k=3)
    counts_NE = np.random.default_rng(0).integers(0, 90, (8, 16))
    planned = geometry.random_layout((1,))
    guard = Guard(PlanMode.FORECAST, make_costs(), geometry)
    alone, visiting = (exact_split(planned, 2, k).solve(counts_NE) for k in (0, 3))
    assert any((alone.rank_row(rank) != visiting.rank_row(rank)).any() for rank in range(8))
    for rank in range(8):
        decision = guard.decide(counts_NE, planned, rank)
        expected = exact_split(planned, 2, 3).solve(counts_NE)
        np.testing.assert_array_equal(decision.rank_quotas.row_S, expected.rank_row(rank))
        np.testing.assert_array_equal(decision.rank_quotas.columns_NC, expected.rank_columns(rank))
        np.testing.assert_array_equal(decision.quotas.rank_row(rank), expected.rank_row(rank))


def test_a_number_of_experts_that_no_token_can_have_is_refused() -> None:
    layout = ExpertLayout.static(2, 2, 4)
    with pytest.raises(ValueError, match=r"top_k must be in 0\.\.E"):
        native.slot_loads(np.ones((2, 4), np.int64), layout.slot_expert_S, 1, 5)


def of_nodes(tokens_N: Int64, node_N: Int64) -> Int64:
    """Return sums by node, which are exact; a source's part of the returning tokens is a share."""
    return np.bincount(node_N, weights=tokens_N).astype(np.int64)


def defined_NS(quotas: ExactQuotas) -> Int64:
    """Return the matrix of quotas from the loads of slots, token by token, int64 [N, S].

    Own tokens first. As many of a node's others stay as `staying` says, of every source the same
    share. The rest is scattered over the room that is left, by multiples of the golden ratio.
    """
    layout, size, counts_NE = quotas.layout, quotas.node_size, quotas.counts_NE
    ranks, num_nodes = layout.num_ranks, layout.num_ranks // size
    share_Q = visit_shares(quotas)
    quota_NS = np.zeros((ranks, layout.num_slots), dtype=np.int64)
    for expert in range(layout.num_experts):
        slots, seen = [], set()
        for slot in np.flatnonzero(layout.slot_expert_S == expert).tolist():
            if slot // layout.capacity not in seen:  # a second slot of a rank gets nothing
                slots.append(slot)
            seen.add(slot // layout.capacity)
        left_N, room = counts_NE[:, expert].copy(), {s: int(quotas.loads_S[s]) for s in slots}
        supply_Q = counts_NE[:, expert].reshape(num_nodes, size).sum(axis=1)
        hosts = {slot // layout.capacity // size for slot in slots}
        strangers = sum(int(supply_Q[node]) for node in range(num_nodes) if node not in hosts)
        for slot in slots:
            rank = slot // layout.capacity
            own = min(int(left_N[rank]), room[slot])
            quota_NS[rank, slot] += own
            left_N[rank] -= own
            room[slot] -= own
        leaving: list[int] = []  # the source of each token
        wanted: list[int] = []  # the slot of each place
        for node in range(num_nodes):
            here = [s for s in slots if s // layout.capacity // size == node]
            load = int(sum(quotas.loads_S[s] for s in here))
            sources = range(node * size, (node + 1) * size)
            tokens = [source for source in sources for _ in range(int(left_N[source]))]
            places = [slot for slot in here for _ in range(room[slot])]
            own = int(supply_Q[node]) - len(tokens)
            visitors = strangers * int(share_Q[node]) // _SHARE_UNITS
            stay = staying(int(supply_Q[node]), load, int(supply_Q.sum()), visitors)
            near = max(stay - own, 0)
            stays = [(at + 1) * near // len(tokens) > at * near // len(tokens)
                     for at in range(len(tokens))]  # fmt: skip
            staying_tokens = [source for source, stay in zip(tokens, stays, strict=True) if stay]
            for source, slot in zip(staying_tokens, places[:near], strict=True):
                quota_NS[source, slot] += 1
            leaving += [source for source, stay in zip(tokens, stays, strict=True) if not stay]
            wanted += places[near:]
        nodes = {slot // layout.capacity // size for slot in wanted}
        whole, factor = len(leaving), 1
        if len(nodes) > 1:
            factor = max(whole * 618033989 // 10**9, 1)
            while gcd(factor, whole) != 1:
                factor += 1
        for at, source in enumerate(leaving):
            quota_NS[source, wanted[at * factor % whole]] += 1
    return quota_NS


def staying(supply: int, load: int, total: int, visitors: int) -> int:
    """Return a node's tokens of an expert that stay there, of those that could."""
    most = min(supply, load)
    if most == 0:
        return 0
    return min(most, max(supply * load // total, load - visitors))


def visit_shares(quotas: ExactQuotas) -> Int64:
    """Return the chance that a token of another expert visits each node, in 1024ths."""
    layout, size = quotas.layout, quotas.node_size
    nodes = layout.num_ranks // size
    node_S = np.arange(layout.num_slots) // (layout.capacity * size)
    load_E = quotas.counts_NE.sum(axis=0)
    alone_Q = np.zeros(nodes)
    for expert in range(layout.num_experts):
        held = layout.slot_expert_S == expert
        assert held.any()
        if len(set(node_S[held].tolist())) == 1:
            alone_Q[node_S[held][0]] += load_E[expert]
    missed_Q = np.ones(nodes)
    for _ in range(quotas.top_k - 1):
        missed_Q *= 1 - alone_Q / max(int(load_E.sum()), 1)
    return ((1 - missed_Q) * _SHARE_UNITS).astype(np.int64)
