"""Exchanges of random layouts by all ways: exact, in order, with the bytes of their hops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Link, way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.traffic import restore_traffic
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import layout_index
from tests.exchange_cases import COLUMNS, CPU, Case
from tests.loopback import groups_of, run
from tests.oracles.hops import hops, rank_hops

FLAT = ExchangeAlgorithm.FLAT
CASES = 100


class Group:
    """All ranks of a case, with an exchange each."""

    def __init__(self, case: Case) -> None:
        self.case, self.ranks = case, range(case.geometry.num_ranks)
        groups = groups_of(case.geometry.num_ranks, case.geometry.node_size)
        self.exchanges = [
            Exchange(group, [case.way], grad_wire_dtype=case.wire) for group in groups
        ]

    def restore(
        self, step: int, before: int | None = None, out: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        case, index = self.case, self.case.index(step)
        had = None if before is None else case.index(before)
        return run(
            [
                exchange.restore_steps(
                    case.owned_by(rank, case.whole_ERK),
                    index,
                    case.matrices,
                    before=had,
                    out=case.new_slots() if out is None else out[rank],
                )
                for rank, exchange in enumerate(self.exchanges)
            ]
        )

    def reduce(self, step: int, before_ERK: torch.Tensor) -> list[list[torch.Tensor]]:
        """Add the sums to each rank's share of these; return the shares."""
        case, index = self.case, self.case.index(step)
        sums = [case.owned_by(rank, before_ERK) for rank in self.ranks]
        run(
            [
                exchange.reduce_steps(
                    case.grads_NCRK[rank], index, case.matrices, add_to=sums[rank]
                )
                for rank, exchange in enumerate(self.exchanges)
            ]
        )
        return sums

    def received(self) -> list[list[int]]:
        """Return each rank's received bytes: of restores and of reduces, in its node and beyond."""
        ways = [(exchange.restored, exchange.reduced) for exchange in self.exchanges]
        return [[part for one in of for part in (one.intra_bytes, one.inter_bytes)] for of in ways]


def moved_rows(case: Case, step: int, before: int | None, rank: int) -> list[np.ndarray]:
    """Return the rows that a rank receives, and sends, in each hop: inside its node and beyond."""
    geometry, way = case.geometry, case.way
    kept = None if before is None else case.placed(before)
    rows_B = case.block_rows(1 if way.is_direct else geometry.num_ranks)
    node, local_rank = divmod(rank, geometry.node_size)
    found = []
    for hop in rank_hops(hops(case.placed(step), way, kept), way, rank):
        own, near = rank, range(node * geometry.node_size, (node + 1) * geometry.node_size)
        if hop.link is Link.BETWEEN:
            own, near = node, range(node, node + 1)
        elif hop.link is Link.INSIDE:
            own, near = local_rank, range(geometry.node_size)
        of_hop = np.zeros((2, 2), dtype=np.int64)
        for at, end in enumerate((hop.received, hop.sent)):
            for peer, block in zip(end.peer_Z.tolist(), end.block_Z.tolist(), strict=True):
                if peer != own:
                    of_hop[at, int(peer not in near)] += rows_B[block]
        found.append(of_hop)
    return found


def check_bytes(case: Case, group: Group) -> None:
    """Compare the bytes of a restore, an update and a reduce with the sums over their hops."""
    count = group.received()
    size = case.dtype.itemsize
    matrices, first, then = case.sizes, case.placed(0), case.placed(1)
    restored = restore_traffic(first, matrices, case.algorithm)
    updated = restore_traffic(then, matrices, case.algorithm, before=first)
    for rank in group.ranks:
        full, update = moved_rows(case, 0, None, rank), moved_rows(case, 1, 0, rank)
        received, sent = sum(full) * COLUMNS
        assert received.tolist() == [restored.intra_N[rank], restored.inter_N[rank]], case
        assert sent.tolist() == [restored.sent_intra_N[rank], restored.sent_inter_N[rank]], case
        received, sent = sum(update) * COLUMNS
        assert received.tolist() == [updated.intra_N[rank], updated.inter_N[rank]], case
        assert sent.tolist() == [updated.sent_intra_N[rank], updated.sent_inter_N[rank]], case
        restores = (sum(full) + sum(update))[0] * COLUMNS * size
        assert count[rank][:2] == restores.tolist(), case
        # Gradients go back: what was sent arrives. The last hop comes first.
        *others, of_slots = moved_rows(case, 1, None, rank)
        back = of_slots[1] * case.grad.itemsize
        for of_hop in others:
            back = back + of_hop[1] * (case.wire or case.grad).itemsize
        assert count[rank][2:] == (back * COLUMNS).tolist(), case


def test_restores_updates_and_reduces_are_exact_and_move_the_bytes_of_their_hops() -> None:
    ways: Counter[tuple[bool, int]] = Counter()
    compared = 0
    for seed in range(CASES):
        case = Case.draw(seed)
        group = Group(case)
        restored = group.restore(0)
        for rank in group.ranks:
            compared += case.check_restored(restored[rank], rank, 0)
        for rank, changed in enumerate(group.restore(1, 0, restored)):
            assert changed is restored[rank]
            case.check_restored(changed, rank, 1)
        given = case.grads_NCRK.clone()
        sums_ERK = case.summed_ERK(1, case.wire or case.grad)
        before_ERK = torch.full_like(sums_ERK, 0.1).to(case.main)
        results = group.reduce(1, before_ERK)
        check_bytes(case, group)
        assert torch.equal(case.grads_NCRK, given), "the gradients were changed"
        for rank in group.ranks:
            totals = case.owned_by(rank, (before_ERK.float() + sums_ERK).to(case.main))
            for found, total in zip(results[rank], totals, strict=True):
                assert torch.equal(found, total), case
        ways[case.way.at_home, len(case.way.widths)] += 1
    assert compared > 10 * CASES
    assert len(ways) == 5, "direct, flat, node, relay, and relay by node"


def test_buffers_are_allocated_once_and_as_large_as_the_bound() -> None:
    """Expect the bound of the first layout's exchanges, and no more for others."""
    for seed in range(40):
        case = Case.draw(seed)
        if case.way.is_direct or not case.placed(0).has_replicas:
            continue
        group, wire = Group(case), case.wire or case.grad
        row_bytes = [COLUMNS * dtype.itemsize for dtype in (case.dtype, case.grad, wire)]
        restores = restore_workspace(case.way, case.matrices, row_bytes[0])
        reduces = reduce_workspace(case.way, case.matrices, *row_bytes[1:])
        for step in range(4):
            group.restore(step)
            group.reduce(step, case.whole_ERK.to(case.main))
            for exchange in group.exchanges:
                assert exchange.restored.workspace.num_bytes <= sum(restores.values()), case
                assert exchange.reduced.workspace.num_bytes <= sum(reduces.values()), case


def test_a_home_sends_directly_as_many_copies_as_it_has_replicas() -> None:
    """One home has all hot experts: its buffer grows to them, and the others' stay small."""
    geometry = Geometry(4, 4, 2, 4, Sharding.EXPERTS)
    layout = ExpertLayout.from_slots(4, 2, 4, [0, -1, 1, 0, 2, 0, 3, 0])
    float32 = torch.float32
    case = Case(geometry, FLAT, ((8, 1), (2, 2)), float32, float32, None, float32, seed=0)
    group, index = Group(case), layout_index(Placed(layout, geometry), CPU)
    sources = [case.owned_by(rank, case.whole_ERK) for rank in group.ranks]
    run(
        [
            exchange.restore_steps(sources[rank], index, case.matrices, out=case.new_slots())
            for rank, exchange in enumerate(group.exchanges)
        ]
    )
    run(
        [
            exchange.reduce_steps(case.grads_NCRK[rank], index, case.matrices, add_to=sources[rank])
            for rank, exchange in enumerate(group.exchanges)
        ]
    )
    one = case.rows * COLUMNS * 4
    for way in ("restored", "reduced"):
        spaces = [getattr(exchange, way).workspace for exchange in group.exchanges]
        assert [space.num_bytes for space in spaces] == [3 * one, 0, 0, 0]
    # The bound is that of one replica for each slot, where a single one is in place.
    assert restore_workspace(case.way, case.matrices, COLUMNS * 4) == {"send": one, "receive": 0}
    assert reduce_workspace(case.way, case.matrices, COLUMNS * 4, COLUMNS * 4) == {
        "receive": one,
        "send": 0,
    }


def test_an_exchange_goes_by_the_way_that_is_chosen_for_its_layout() -> None:
    geometry = Geometry(4, 8, 3, 2, Sharding.EXPERTS)
    ways = [way_of(geometry, algorithm) for algorithm in ExchangeAlgorithm]
    chosen = [
        Exchange(group, ways, lambda placed: ways[placed.quantised]) for group in groups_of(4, 2)
    ]
    assert len(set(chosen[0].communicators)) == 2 * len(Link)
    for quantised in (False, True):
        of = Placed(geometry.random_layout((1,)), geometry, quantised)
        index, homes = layout_index(of, CPU), torch.randn(8, 4, COLUMNS)
        before = [exchange.restored.collectives for exchange in chosen]
        run(
            [
                exchange.restore_steps(
                    [*homes[rank * 2 : rank * 2 + 2]], index, ((4, 1),), out=torch.empty(1, 4, 3)
                )
                for rank, exchange in enumerate(chosen)
            ]
        )
        after = [exchange.restored.collectives for exchange in chosen]
        # A node without a replica has fewer.
        assert max(b - a for a, b in zip(before, after, strict=True)) == len(ways[quantised].links)
