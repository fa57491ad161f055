"""Rows travel through both stages and back; one process acts as all ranks.

Legend: N ranks, C slots per rank, G ranks per node, T tokens, E experts, P pairs, R pairs received.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_laer.choices import Split
from megatron_laer.layer.dispatch.row_map import RowMap
from megatron_laer.layer.dispatch.token_routes import (
    arrivals,
    pair_routes,
    second_stage,
    token_order,
)
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from megatron_laer.planner.token_rows import SizeMessages
from tests.token_exchange import known_rows

EXPERTS, CAPACITY, TOP_K = 24, 6, 4


def exchange(
    sent: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]], groups: Sequence[list[int]]
) -> list[torch.Tensor]:
    """Exchange rows within each group; `sizes` are the rows from each rank to its group."""
    received = {}
    for ranks in groups:
        parts = {rank: sent[rank].split(list(sizes[rank])) for rank in ranks}
        for place, rank in enumerate(ranks):
            received[rank] = torch.cat([parts[source][place] for source in ranks])
    return [received[rank] for rank in range(len(sent))]


class Exchange:
    def __init__(self, num_ranks: int, node_size: int) -> None:
        self.layout = ExpertLayout.random(num_ranks, CAPACITY, EXPERTS, seed=(node_size,))
        generator = torch.Generator().manual_seed(num_ranks)
        self.maps = []
        for rank in range(num_ranks):
            scores_TE = torch.rand(0 if rank == 1 else 5 + rank, EXPERTS, generator=generator)
            map_TE = torch.zeros(scores_TE.shape, dtype=torch.bool)
            self.maps.append(map_TE.scatter_(1, scores_TE.topk(TOP_K, dim=1).indices, True))
        counts_NE = np.stack([map_TE.sum(0).numpy() for map_TE in self.maps])
        solved = solve_quotas(Split.EXACT, counts_NE, self.layout, node_size)
        self.quotas = [
            RankQuotas.of(self.layout, solved.rank_row(rank), solved.rank_columns(rank))
            for rank in range(num_ranks)
        ]
        self.slots = [
            token_order(map_TE, quotas)
            for map_TE, quotas in zip(self.maps, self.quotas, strict=True)
        ]
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
        messages, node = of_all[rank], rank // node_size
        told = sum(map(len, messages.received)) - len(messages.received[rank])
        assert messages.received == [of.sent[rank] for of in of_all]
        assert rows.has_two_stages == has_two_stages
        if not has_two_stages:
            assert rows.first_sent == to_ranks_NN[rank].tolist()
            assert rows.first_received == to_ranks_NN[:, rank].tolist()
            assert rows.second_sent == rows.second_received == []
            assert told == num_ranks - 1
            continue
        peers = [peer for peer in range(num_ranks) if peer % node_size == rank % node_size]
        near = range(node * node_size, (node + 1) * node_size)
        assert rows.first_sent == to_nodes_NM[rank].tolist()
        assert rows.first_received == [to_nodes_NM[peer, node] for peer in peers]
        assert rows.second_sent == [sum(to_ranks_NN[peer, to] for peer in peers) for to in near]
        assert rows.second_received == [
            sum(to_ranks_NN[local::node_size, rank]) for local in range(node_size)
        ]
        assert told == 2 * num_ranks - node_size - 1
