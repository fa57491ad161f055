"""Exchanges of random layouts by all ways: exact, in order, with the bytes of their hops."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from megatron_laer.arrays import Int64
from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Link, Way, way_of, ways_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.traffic import restore_traffic
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm import buffers
from megatron_laer.runtime.comm.buffers import Buffer, BufferPool, Workspace
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.streams import Steps, finish
from tests.exchange_cases import COLUMNS, CPU, Case
from tests.loopback import Moved, groups_of, run

FLAT = ExchangeAlgorithm.FLAT
CASES = 100
# Whether experts are at home, the number of holdings, and whether homes spread over their node.
Kind = tuple[bool, int, bool]


class Group:
    """All ranks of a case, with an exchange each; `moved` has what each call moved."""

    def __init__(self, case: Case) -> None:
        self.case, self.ranks = case, range(case.geometry.num_ranks)
        self.moved: list[Moved] = []
        groups = groups_of(case.geometry.num_ranks, case.geometry.node_size)
        self.exchanges = [
            Exchange(group, [case.way], grad_wire_dtype=case.wire) for group in groups
        ]

    def _run(self, exchanges: list[Steps]) -> list[torch.Tensor]:
        self.moved.append({})
        return run(exchanges, self.moved[-1])

    def restore(
        self,
        index: LayoutIndex,
        had: LayoutIndex | None = None,
        out: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        case = self.case
        return self._run(
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

    def reduce(self, index: LayoutIndex, before_ERK: torch.Tensor) -> list[list[torch.Tensor]]:
        """Add the sums to each rank's share of these; return the shares."""
        case = self.case
        sums = [case.owned_by(rank, before_ERK) for rank in self.ranks]
        self._run(
            [
                exchange.reduce_steps(
                    case.grads_NCRK[rank], index, case.matrices, add_to=sums[rank]
                )
                for rank, exchange in enumerate(self.exchanges)
            ]
        )
        return sums

    def counted(self) -> Int64:
        """Return each rank's own counts of received bytes: of restores, and then of reduces."""
        ways = [(exchange.restored, exchange.reduced) for exchange in self.exchanges]
        return np.array(
            [[n for one in of for n in (one.intra_bytes, one.inter_bytes)] for of in ways]
        )


def bytes_of(case: Case, moved: Moved) -> Int64:
    """Return bytes [4, N]: received in the rank's node and from others, and sent to them."""
    num_ranks = case.geometry.num_ranks
    bytes_NN = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for ranks, calls in moved.items():
        for elements_PP, dtype in calls:
            bytes_NN[np.ix_(ranks, ranks)] += elements_PP * dtype.itemsize
    np.fill_diagonal(bytes_NN, 0)
    node_N = np.arange(num_ranks) // case.geometry.node_size
    near_NN = bytes_NN * (node_N[:, None] == node_N)
    parts = near_NN, bytes_NN - near_NN
    return np.stack([part_NN.sum(axis) for axis in (0, 1) for part_NN in parts])


def check_bytes(case: Case, group: Group) -> None:
    """Compare the moved bytes with the planner's, the exchange's own counts, and nodes' needs."""
    restored, updated, reduced = (bytes_of(case, moved) for moved in group.moved)
    first, then, matrices = case.placed(0), case.placed(1), case.sizes
    for found, traffic, layouts in (
        (restored, restore_traffic(first, matrices, case.way), (0, None)),
        (updated, restore_traffic(then, matrices, case.way, before=first), (1, 0)),
    ):
        of_N = traffic.intra_N, traffic.inter_N, traffic.sent_intra_N, traffic.sent_inter_N
        np.testing.assert_array_equal(found, np.stack(of_N) * case.dtype.itemsize, str(case))
        into_nodes = found[1].reshape(case.geometry.num_nodes, -1).sum(axis=1)
        needed = np.array(case.rows_into_nodes(*layouts)) * COLUMNS * case.dtype.itemsize
        np.testing.assert_array_equal(into_nodes, needed, str(case))
    counted = np.concatenate([(restored + updated)[:2], reduced[:2]]).T
    np.testing.assert_array_equal(group.counted(), counted, str(case))


def check_way_back(case: Case, restored: Moved, reduced: Moved) -> None:
    """Expect a reduce to be the restore walked back, whose sums alone have the wire's dtype."""
    assert reduced.keys() == restored.keys(), case
    for ranks, calls in reduced.items():
        for (back_PP, _), (there_PP, _) in zip(calls, reversed(restored[ranks]), strict=True):
            np.testing.assert_array_equal(back_PP, there_PP.T, str(case))
        is_node = ranks[-1] - ranks[0] < case.geometry.node_size
        begins_at_slots = is_node or case.way.links[-1] is Link.ALL
        dtypes = [case.wire or case.grad] * len(calls)
        dtypes[:1] = [case.grad] if begins_at_slots else dtypes[:1]
        assert [dtype for _, dtype in calls] == dtypes, case


def kind_of(way: Way) -> Kind:
    return way.geometry.home_slots > 0, len(way.widths), way.spreads_in_nodes


def test_restores_updates_and_reduces_are_exact_and_move_the_bytes_of_their_hops() -> None:
    drawn, known, compared = set[Kind](), set[Kind](), 0
    for seed in range(CASES):
        case = Case.draw(seed)
        group = Group(case)
        first, then = case.index(0), case.index(1)
        restored = group.restore(first)
        for rank in group.ranks:
            compared += case.check_restored(restored[rank], rank, 0)
        for rank, changed in enumerate(group.restore(then, first, restored)):
            assert changed is restored[rank]
            case.check_restored(changed, rank, 1)
        given = case.grads_NCRK.clone()
        sums_ERK = case.summed_ERK(1, case.wire or case.grad)
        before_ERK = torch.full_like(sums_ERK, 0.1).to(case.main)
        results = group.reduce(then, before_ERK)
        check_bytes(case, group)
        group.restore(then)
        check_way_back(case, group.moved[-1], group.moved[-2])
        assert torch.equal(case.grads_NCRK, given), "the gradients were changed"
        for rank in group.ranks:
            totals = case.owned_by(rank, (before_ERK.float() + sums_ERK).to(case.main))
            for found, total in zip(results[rank], totals, strict=True):
                assert torch.equal(found, total), case
        drawn.add(kind_of(case.way))
        known |= {kind_of(way) for way in ways_of(case.geometry)}
    assert compared > 10 * CASES
    assert drawn == known
    assert len(known) >= 6, "direct, flat, node, relay, relay by node, and relay in nodes"


def test_buffers_are_allocated_once_and_as_large_as_the_bound() -> None:
    """Expect the bound of the first layout's exchanges, and no more for others."""
    for seed in range(40):
        case = Case.draw(seed)
        if case.way.buffers_grow or not case.placed(0).has_replicas:
            continue
        group, wire = Group(case), case.wire or case.grad
        row_bytes = [COLUMNS * dtype.itemsize for dtype in (case.dtype, case.grad, wire)]
        restores = restore_workspace(case.way, case.matrices, row_bytes[0])
        reduces = reduce_workspace(case.way, case.matrices, *row_bytes[1:])
        for step in range(4):
            group.restore(case.index(step))
            group.reduce(case.index(step), case.whole_ERK.to(case.main))
            for exchange in group.exchanges:
                assert exchange.restored.workspace.num_bytes <= sum(restores.values()), case
                assert exchange.reduced.workspace.num_bytes <= sum(reduces.values()), case


def test_a_home_sends_directly_as_many_copies_as_it_has_replicas() -> None:
    """One home has all hot experts: its buffer grows to them, and the others' stay small."""
    geometry = Geometry(4, 4, 2, 4, Sharding.EXPERTS)
    layout = ExpertLayout.from_slots(4, 2, 4, [0, -1, 1, 0, 2, 0, 3, 0])
    float32 = torch.float32
    case = Case(
        geometry, way_of(geometry, FLAT), ((8, 1), (2, 2)), float32, float32, None, float32, seed=0
    )
    group, index = Group(case), layout_index(Placed(layout, geometry), CPU)
    group.restore(index)
    group.reduce(index, case.whole_ERK)
    one = case.rows * COLUMNS * 4
    for way in ("restored", "reduced"):
        spaces = [getattr(exchange, way).workspace for exchange in group.exchanges]
        assert [space.num_bytes for space in spaces] == [3 * one, 0, 0, 0]
    # A single replica slot is in place.
    row_bytes = COLUMNS * 4
    bound = {"send": 3 * one, "receive": 0}
    assert restore_workspace(case.way, case.matrices, row_bytes) == bound
    bound = {"receive": 3 * one, "send": 0}
    assert reduce_workspace(case.way, case.matrices, row_bytes, row_bytes) == bound


@pytest.mark.parametrize("rows", [((2, 1), (4, 1)), ((4, 1), (2, 1)), ((2, 2), (6, 1))], ids=str)
def test_one_expert_alone_is_sent_with_all_its_matrices_whatever_their_heights(
    rows: tuple[tuple[int, int], ...],
) -> None:
    """Its rows in two tensors may be as far apart as they are on the wire, as in one tensor."""
    geometry = Geometry(2, 4, 3, 2)
    float32 = torch.float32
    for way in ways_of(geometry):
        case = Case(geometry, way, rows, float32, float32, None, float32, seed=0)
        for expert in range(4):
            before = [0, 1, 2, 3, (expert + 1) % 4, (expert + 2) % 4]
            after = [*before[:4], expert, before[5]]
            group = Group(case)
            had, index = (
                layout_index(Placed(ExpertLayout.from_slots(2, 3, 4, slots), geometry), CPU)
                for slots in (before, after)
            )
            restored = group.restore(had)
            group.restore(index, had, restored)
            assert torch.equal(restored[1][1], case.whole_ERK[expert]), (rows, expert)


def test_an_exchange_goes_by_the_way_that_is_chosen_for_its_layout() -> None:
    geometry = Geometry(4, 8, 3, 2, Sharding.EXPERTS)
    direct, *_, relay = ways = ways_of(geometry)
    chosen = [
        Exchange(group, ways, lambda placed: relay if placed.quantised else direct)
        for group in groups_of(4, 2)
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
        way = relay if quantised else direct
        # A node without a replica has fewer.
        assert max(b - a for a, b in zip(before, after, strict=True)) == len(way.links)


def in_steps(number: int, done: list[str]) -> Steps:
    for at in range(number):
        done.append(f"send {at}")
        yield at + 1 < number
        done.append(f"unpack {at}")
    return torch.tensor(number)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_exchange_runs_to_its_end(number: int) -> None:
    done: list[str] = []
    assert finish(in_steps(number, done)) == torch.tensor(number)
    assert done == [f"{part} {at}" for at in range(number) for part in ("send", "unpack")]


def test_a_buffer_grows_between_exchanges_and_lends_its_rows_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = Workspace()
    monkeypatch.setattr(buffers, "POISONS", False)

    def lent(num_bytes: int) -> AbstractContextManager[Workspace]:
        return space.lent({"send": num_bytes, "receive": 0}, CPU)

    for num_bytes, wanted in ((2, 2), (8, 8), (4, 8)):
        with lent(num_bytes):
            assert space.send.take(num_bytes, 1, torch.uint8).shape == (num_bytes, 1)
            assert space.num_bytes == wanted
            with pytest.raises(AssertionError, match="send: rows that have not left would be"):
                space.send.take(1, 1, torch.uint8)
            with pytest.raises(AssertionError, match="send: rows of another exchange are in the"):
                lent(1).__enter__()
    with lent(0):
        first = space.send.take(2, 1, torch.uint8).data_ptr()
        space.send.give_back()
        assert space.send.take(4, 1, torch.uint8).data_ptr() == first
        space.send.give_back()
        with pytest.raises(AssertionError, match="send: 9 bytes exceed the 8 that were reserved"):
            space.send.take(9, 1, torch.uint8)
    with pytest.raises(ZeroDivisionError), lent(8):
        space.send.take(8, 1, torch.uint8)
        raise ZeroDivisionError
    with lent(8):
        space.send.take(8, 1, torch.uint8)


def test_a_buffer_has_no_room_of_former_exchanges_under_poison() -> None:
    buffer = Buffer("send")
    for num_bytes in (2, 8, 4):
        buffer.reserve(num_bytes, CPU)
        assert buffer.num_bytes == num_bytes


def test_memory_is_poisoned_when_it_is_taken_given_back_and_outgrown() -> None:
    buffer, pool = Buffer("send"), BufferPool()
    buffer.reserve(8, CPU)
    rows = buffer.take(2, 1, torch.float32)
    assert rows.isnan().all()
    rows.zero_()
    buffer.give_back()
    assert rows.isnan().all()
    rows.zero_()
    buffer.reserve(16, CPU)
    assert rows.isnan().all()
    assert buffer.take(8, 1, torch.bfloat16).isnan().all()
    pooled = pool.take((2, 3), torch.float32, CPU)
    assert pooled.isnan().all()
    pooled.zero_()
    pool.put_back(pooled)
    assert pooled.isnan().all()
    assert pool.take((2, 3), torch.float32, CPU) is pooled
    pool.put_back(pooled)
    pooled[1, 1] = 0
    with pytest.raises(AssertionError, match="memory was written after it was put back"):
        pool.take((2, 3), torch.float32, CPU)


def test_sums_between_hops_have_the_settings_dtype_over_the_callers() -> None:
    geometry = Geometry(4, 8, 3, 2, Sharding.EXPERTS)
    way = ways_of(geometry)[-1]
    index = layout_index(Placed(geometry.random_layout((1,)), geometry), CPU)
    for of_setting, wanted in ((torch.float32, torch.float32), (None, torch.float16)):
        exchanges = [Exchange(one, [way], grad_wire_dtype=of_setting) for one in groups_of(4, 2)]
        moved: Moved = {}
        run(
            [
                exchange.reduce_steps(
                    torch.ones(1, 4, COLUMNS, dtype=torch.bfloat16),
                    index,
                    ((4, 1),),
                    add_to=[torch.zeros(4, COLUMNS) for _ in range(2)],
                    wire_dtype=torch.float16,
                )
                for exchange in exchanges
            ],
            moved,
        )
        dtypes = {dtype for calls in moved.values() for _, dtype in calls}
        assert dtypes == {torch.bfloat16, wanted}


def test_a_relay_in_nodes_leaves_nodes_between_them_alone() -> None:
    ways = ways_of(Geometry(8, 8, 3, 4, Sharding.EXPERTS))
    (relay,) = (way for way in ways if way.spreads_in_nodes)
    assert relay.links == (Link.INSIDE, Link.BETWEEN, Link.INSIDE)


@pytest.mark.parametrize(
    ("links", "message"),
    [((2, 2, 2), "link 2 does not connect ranks"), ((2, 1, 1), "link 1 does not connect ranks")],
)
def test_links_that_do_not_connect_ranks_are_refused_by_the_native_core(
    links: tuple[int, ...], message: str
) -> None:
    sizes = 8, 8, 3, 4, 1
    slots_S = Geometry(8, 8, 3, 4, Sharding.EXPERTS).random_layout((1,)).slot_expert_S
    right = native.Way(*sizes, (1, 4, 4, 1), (2, 1, 2), 8)
    wrong = native.Way(*sizes, (1, 4, 4, 1), links, 8)
    for rank in range(8):
        native.rank_moves(right, slots_S, None, rank, ((8, 1),))
    with pytest.raises(ValueError, match=message):
        for rank in range(8):
            native.rank_moves(wrong, slots_S, None, rank, ((8, 1),))


def test_slots_experts_and_widths_out_of_range_are_refused_by_the_native_core() -> None:
    slots_S = np.array([0, 1, 1, 0], dtype=np.int16)
    way = native.Way(2, 2, 2, 2, 1, (1, 2, 1), (0, 0), 2)
    native.rank_moves(way, slots_S, None, 0, ((4, 1),))
    with pytest.raises(ValueError, match="slots"):
        native.rank_moves(way, slots_S[:3], None, 0, ((4, 1),))
    with pytest.raises(ValueError):
        native.rank_moves(way, np.array([0, 1, 1, 7], dtype=np.int16), None, 0, ((4, 1),))
    with pytest.raises(ValueError, match="one the other"):
        native.Way(6, 6, 2, 3, 1, (1, 2, 1), (0, 0), 6)
    # A rank holds one block of two experts, and this way has two blocks of each on one rank.
    blocks = native.Way(2, 2, 2, 2, 0, (1, 1), (0,), 2)
    with pytest.raises(IndexError, match="needs rows of expert 2 of a holding that has fewer"):
        native.rank_moves(blocks, slots_S, None, 0, ((4, 1),))
