"""Traffic of token exchanges equals a row-by-row count, and `node` never sends more.

Legend: N ranks, C slots per rank, S slots, G ranks per node, T tokens, E experts, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.token_traffic import (
    TokenRouting,
    dispatch_rows,
)
from megatron_laer.arrays import Bool
from megatron_laer.choices import TokenExchange
from megatron_laer.layer.dispatch.node_dispatcher import rows_through_nodes
from megatron_laer.layer.dispatch.slot_dispatch import rows_by_node
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.layout import ExpertLayout
from tests.token_exchange import known_rows
from tests.unit.planner_cases import geometries, shape_of

RANK, NODE = TokenExchange


@dataclass(frozen=True)
class Case:
    maps: list[Bool]
    slots: list[npt.NDArray[np.int32]]
    layout: ExpertLayout
    node_size: int

    @property
    def routing(self) -> TokenRouting:
        return TokenRouting.count(self.maps, self.slots, self.layout.capacity, self.node_size)


def make_case(
    ranks: int,
    capacity: int,
    experts: int,
    node_size: int,
    tokens: list[int],
    top_k: int,
    seed: int = 0,
) -> Case:
    """Route at random on a random layout, each pair to any replica of its expert."""
    rng = np.random.default_rng(seed)
    layout = ExpertLayout.random(ranks, capacity, experts, seed=(seed,))
    maps, slots = [], []
    for count in tokens:
        map_TE = np.zeros((count, experts), dtype=np.bool_)
        chosen_TK = np.argsort(rng.random(map_TE.shape), axis=1)[:, :top_k]
        np.put_along_axis(map_TE, chosen_TK, True, axis=1)
        maps.append(map_TE)
        expert_P = np.nonzero(map_TE.T)[0]
        replicas = [np.flatnonzero(layout.slot_expert_S == e) for e in range(experts)]
        slots.append(np.array([rng.choice(replicas[e]) for e in expert_P], dtype=np.int32))
    return Case(maps, slots, layout, node_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw shapes of all kinds, also nodes of one or all ranks, and ranks without tokens."""
    geometry, seed = draw(geometries(8, 12, 2)), draw(st.integers(0, 2**16))
    ranks = geometry.num_ranks
    tokens = draw(st.lists(st.integers(0, 20), min_size=ranks, max_size=ranks))
    top_k = draw(st.integers(1, min(geometry.num_experts, 4)))
    return make_case(*shape_of(geometry), geometry.node_size, tokens, top_k, seed)


@given(cases(), st.sampled_from(list(TokenExchange)))
@settings(deadline=None)
def test_dispatchers_count_the_rows_that_a_rank_sends(case: Case, exchange: TokenExchange) -> None:
    routing, size = case.routing, case.node_size
    rows = dispatch_rows(routing, exchange)
    for rank in range(case.layout.num_ranks):
        if exchange == NODE:
            to_ranks_NN, to_nodes_NM = map(np.asarray, (routing.to_ranks_NN, routing.to_nodes_NM))
            sent = rows_through_nodes(known_rows(to_ranks_NN, to_nodes_NM, size)[rank], rank, size)
        else:
            sent = rows_by_node(routing.pairs_NN[rank].tolist(), rank, size)
        assert sent == (rows.sent_intra_N[rank], rows.sent_inter_N[rank])


@given(cases())
@settings(deadline=None)
def test_node_never_sends_more_rows_between_nodes_than_rank(case: Case) -> None:
    by_rank, by_node = (dispatch_rows(case.routing, exchange) for exchange in (RANK, NODE))
    assert (by_node.sent_inter_N <= by_rank.sent_inter_N).all()
    received = [rows.inter_N.reshape(-1, case.node_size).sum(axis=1) for rows in (by_node, by_rank)]
    assert (received[0] <= received[1]).all()
    if case.node_size == 1:
        assert (by_node.inter_N <= by_rank.inter_N).all()
    if case.node_size == case.layout.num_ranks:
        assert (by_node.intra_N <= by_rank.intra_N).all()
        assert (by_node.sent_intra_N <= by_rank.sent_intra_N).all()


@pytest.mark.parametrize("capacity", [4, 5, 8])
def test_expected_rows_are_near_to_those_of_random_routing(capacity: int) -> None:
    case = make_case(8, 2 * capacity, 64, 2, [1024] * 8, top_k=8)
    counts_NE = np.stack([map_TE.sum(axis=0) for map_TE in case.maps])
    quotas = exact_split(case.layout, 2).solve(counts_NE)
    quota_NS = np.stack([quotas.rank_row(rank) for rank in range(8)])
    slots = [_token_order(quota_NS[rank], case.layout) for rank in range(8)]
    counted = TokenRouting.count(case.maps, slots, case.layout.capacity, 2)
    expected = TokenRouting.expect(quota_NS, np.full(8, 1024), case.layout, 2)
    np.testing.assert_array_equal(expected.pairs_NN, counted.pairs_NN)
    for exact, guess in (
        (counted.to_ranks_NN, expected.to_ranks_NN),
        (counted.to_nodes_NM, expected.to_nodes_NM),
    ):
        assert guess.sum() == pytest.approx(exact.sum(), rel=0.04)


def _token_order(row_S: npt.NDArray[np.int64], layout: ExpertLayout) -> npt.NDArray[np.int64]:
    by_expert = np.argsort(layout.slot_expert_S, kind="stable")
    return np.repeat(by_expert, row_S[by_expert])
