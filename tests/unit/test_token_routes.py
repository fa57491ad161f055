"""Rows travel through both stages and back, as many as are counted; one process acts as all ranks.

Legend: N ranks, M nodes, S slots, T tokens, E experts, P pairs, R pairs received.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.token_traffic import TokenRouting, dispatch_rows
from megatron_laer.choices import Dispatch, Sharding, Split, TokenExchange
from megatron_laer.layer.dispatch.node_dispatcher import rows_through_nodes
from megatron_laer.layer.dispatch.row_map import RowMap
from megatron_laer.layer.dispatch.slot_dispatch import rows_by_node
from megatron_laer.layer.dispatch.token_routes import (
    arrivals,
    pair_routes,
    second_stage,
    token_order,
)
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.planner.token_rows import SizeMessages
from tests.costs import make_costs
from tests.token_exchange import known_rows
from tests.unit.planner_cases import geometries
from tests.unit.routed import Rank, exchange, route

EXPERTS, CAPACITY, TOP_K = 24, 6, 4


class Exchange:
    def __init__(self, num_ranks: int, node_size: int) -> None:
        layout = ExpertLayout.random(num_ranks, CAPACITY, EXPERTS, seed=(node_size,))
        tokens = [0 if rank == 1 else 5 + rank for rank in range(num_ranks)]
        routed = route(layout, tokens, TOP_K, seed=num_ranks, node_size=node_size)
        self.maps = [rank.map_TE for rank in routed]
        self.quotas = [rank.quotas for rank in routed]
        self.slots = [token_order(rank.map_TE, rank.quotas) for rank in routed]
        self.routes = [
            pair_routes(map_TE, slot_P, num_ranks, CAPACITY, node_size)
            for map_TE, slot_P in zip(self.maps, self.slots, strict=True)
        ]
        sizes_NZ = torch.stack([routes.sizes_Z for routes in self.routes]).long().numpy()
        self.rows = known_rows(sizes_NZ[:, :num_ranks], sizes_NZ[:, num_ranks:], node_size)
        ranks = list(range(num_ranks))
        self.all = [ranks]
        self.nodes = [ranks[first : first + node_size] for first in range(0, num_ranks, node_size)]
        self.across = [ranks[local::node_size] for local in range(node_size)]
        if not 1 < node_size < num_ranks:
            self.across = self.all

    def expected_R(self, rank: int) -> list[int]:
        """Return the tokens of a rank's pairs, by slot, then source rank, then token."""
        pairs = []
        for source, (map_TE, slot_P) in enumerate(zip(self.maps, self.slots, strict=True)):
            tokens = [token for column in map_TE.t() for token in column.nonzero().view(-1)]
            pairs += [
                (slot, source, int(token))
                for token, slot in zip(tokens, slot_P.tolist(), strict=True)
                if slot // CAPACITY == rank
            ]
        return [1000 * source + token for _, source, token in sorted(pairs)]


@pytest.mark.parametrize(
    ("num_ranks", "node_size"), [(4, 1), (4, 4), (6, 2), (16, 8), (18, 9), (34, 17)]
)
def test_each_pair_gets_its_tokens_row_and_each_token_the_sum_of_its_pairs(
    num_ranks: int, node_size: int
) -> None:
    """Nodes of 9 and of 17 need two and three bytes, with bits for eight local ranks each."""
    known = Exchange(num_ranks, node_size)
    rows, ranks = known.rows, range(num_ranks)

    tokens = [
        (1000 * rank + torch.arange(len(known.maps[rank]))).float().unsqueeze(1) for rank in ranks
    ]
    first_sent = [of.first_sent for of in rows]
    stages = [known.routes[rank].first_stage(sum(first_sent[rank])) for rank in ranks]
    first = [map_ for map_, _ in stages]
    came = exchange([first[rank].spread(tokens[rank]) for rank in ranks], first_sent, known.across)
    assert [len(one) for one in came] == [sum(of.first_received) for of in rows]

    second: list[RowMap] = []
    second_sent = [of.second_sent for of in rows]
    if 1 < node_size < num_ranks:
        bits = exchange([bits for _, bits in stages if bits is not None], first_sent, known.across)
        assert all(one.shape[1] == -(-node_size // 8) for one in bits)
        second = [second_stage(bits[rank], node_size, sum(second_sent[rank])) for rank in ranks]
        passed_on = [second[rank].spread(came[rank]) for rank in ranks]
        came = exchange(passed_on, second_sent, known.nodes)

    row_R = exchange(
        [routes.row_P for routes in known.routes],
        [quotas.input_splits_N for quotas in known.quotas],
        known.all,
    )
    arrived = [arrivals(row_R[rank], known.quotas[rank], rows[rank]).rows for rank in ranks]
    for rank in ranks:
        assert arrived[rank].num_rows == len(came[rank])
        assert arrived[rank].spread(came[rank]).view(-1).tolist() == known.expected_R(rank)

    back = [arrived[rank].collect(torch.ones(len(row_R[rank]), 1)) for rank in ranks]
    if second:
        received = [of.second_received for of in rows]
        back = exchange(back, received, known.nodes)
        back = [second[rank].collect(back[rank]) for rank in ranks]
    back = exchange(back, [of.first_received for of in rows], known.across)
    for rank in ranks:
        pairs_T = known.maps[rank].sum(1).tolist()
        assert first[rank].collect(back[rank]).view(-1).tolist() == pairs_T


@pytest.mark.parametrize(
    ("num_ranks", "node_size"), [(1, 1), (4, 1), (4, 4), (4, 2), (6, 3), (12, 4), (16, 8)]
)
def test_a_rank_is_told_the_sizes_that_it_needs_and_no_more(num_ranks: int, node_size: int) -> None:
    nodes = num_ranks // node_size
    has_two_stages = 1 < node_size < num_ranks
    draw = np.random.default_rng(num_ranks * node_size)
    to_ranks_NN = draw.integers(0, 1000, (num_ranks, num_ranks))
    to_nodes_NM = draw.integers(0, 1000, (num_ranks, nodes if has_two_stages else 0))
    of_all = [SizeMessages(rank, num_ranks, node_size) for rank in range(num_ranks)]
    for rank, rows in enumerate(known_rows(to_ranks_NN, to_nodes_NM, node_size)):
        assert rows.from_ranks_N.tolist() == to_ranks_NN[:, rank].tolist()
        assert rows.has_two_stages == has_two_stages
        received = of_all[rank].received
        assert received == [of.sent[rank] for of in of_all]
        told = sum(map(len, received)) - len(received[rank])
        assert told == (2 * num_ranks - node_size - 1 if has_two_stages else num_ranks - 1)


RANK, NODE = TokenExchange


def counted(ranks: list[Rank]) -> TokenRouting:
    maps = [rank.map_TE.numpy() for rank in ranks]
    slots = [token_order(rank.map_TE, rank.quotas).numpy() for rank in ranks]
    return TokenRouting.count(maps, slots, ranks[0].layout.capacity, ranks[0].node_size)


@st.composite
def cases(draw: st.DrawFn) -> list[Rank]:
    """Draw shapes of all kinds, also nodes of one or all ranks, and ranks without tokens."""
    geometry, seed = draw(geometries(8, 12, 2)), draw(st.integers(0, 2**16))
    ranks = geometry.num_ranks
    tokens = draw(st.lists(st.integers(0, 20), min_size=ranks, max_size=ranks))
    top_k = draw(st.integers(1, min(geometry.num_experts, 4)))
    layout = ExpertLayout.random(*geometry.shape, seed=(seed,))
    of = {"node_size": geometry.node_size, "split": [*Split][seed % len(Split)]}
    return route(layout, tokens, top_k, seed, **of)  # type: ignore[arg-type]


@given(cases(), st.sampled_from(list(TokenExchange)))
def test_dispatchers_count_the_rows_that_a_rank_sends(
    ranks: list[Rank], exchange: TokenExchange
) -> None:
    routing, size = counted(ranks), ranks[0].node_size
    rows = dispatch_rows(routing, exchange)
    for rank in range(len(ranks)):
        if exchange == NODE:
            to_ranks_NN, to_nodes_NM = map(np.asarray, (routing.to_ranks_NN, routing.to_nodes_NM))
            sent = rows_through_nodes(known_rows(to_ranks_NN, to_nodes_NM, size)[rank], rank, size)
        else:
            sent = rows_by_node(routing.pairs_NN[rank].tolist(), rank, size)
        assert sent == (rows.sent_intra_N[rank], rows.sent_inter_N[rank])


@given(cases())
def test_node_never_sends_more_rows_between_nodes_than_rank(ranks: list[Rank]) -> None:
    size = ranks[0].node_size
    by_rank, by_node = (dispatch_rows(counted(ranks), exchange) for exchange in (RANK, NODE))
    assert (by_node.sent_inter_N <= by_rank.sent_inter_N).all()
    received = [rows.inter_N.reshape(-1, size).sum(axis=1) for rows in (by_node, by_rank)]
    assert (received[0] <= received[1]).all()
    if size == 1:
        assert (by_node.inter_N <= by_rank.inter_N).all()
    if size == len(ranks):
        assert (by_node.intra_N <= by_rank.intra_N).all()
        assert (by_node.sent_intra_N <= by_rank.sent_intra_N).all()


@pytest.mark.parametrize("sharding", list(Sharding))
@pytest.mark.parametrize("capacity", [9, 12, 48])
def test_expected_rows_are_near_to_those_of_random_routing(
    sharding: Sharding, capacity: int
) -> None:
    geometry = Geometry(8, 64, capacity, 2, sharding)
    even_NE = np.full((8, 64), 128)
    layout = construct_layout(even_NE, geometry.static_layout, 2, sharding)
    ranks = route(layout, [1024] * 8, top_k=8, node_size=2)
    pairs, rows = (dispatch_rows(counted(ranks), exchange) for exchange in (RANK, NODE))
    priced = with_token_exchange(make_costs(), Dispatch.NODE, geometry, 8, 1024).tokens
    leaving = pairs.intra_N.sum() + pairs.inter_N.sum()
    assert priced.intra_rows * leaving == pytest.approx(rows.intra_N.sum(), rel=0.05)
    assert priced.inter_rows * pairs.inter_N.sum() == pytest.approx(rows.inter_N.sum(), rel=0.05)
