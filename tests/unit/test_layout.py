"""ExpertLayout is legal by construction, equal by content, and the same on every machine."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout, default_capacity, stock_owner_E
from tests.unit.planner_cases import geometries, home_geometries

SHAPES = geometries(40, 64, spare=64).map(lambda geometry: geometry.shape)


def assert_legal(layout: ExpertLayout, shape: tuple[int, int, int]) -> None:
    num_ranks, capacity, _ = shape
    assert (layout.num_ranks, layout.capacity, layout.num_experts) == shape
    assert layout.slot_expert_S.shape == (num_ranks * capacity,) == (layout.num_slots,)
    assert layout.replicas_E.min() >= 1
    assert layout.replicas_E.sum() == layout.num_slots


@given(SHAPES)
def test_static_has_no_duplicates_and_stocks_placement_where_ranks_divide_experts(
    shape: tuple[int, int, int],
) -> None:
    num_ranks, capacity, num_experts = shape
    layout = ExpertLayout.static(*shape)
    assert_legal(layout, shape)
    is_stock = num_experts % num_ranks == 0 and (capacity < num_experts or num_ranks == 1)
    for rank in range(num_ranks):
        experts = layout.experts_of(rank)
        assert len({*experts}) == capacity
        if is_stock:
            stock = np.flatnonzero(stock_owner_E(num_ranks, num_experts) == rank)
            assert experts[: num_experts // num_ranks] == tuple(stock.tolist())


@given(SHAPES, st.integers(1, 8))
def test_static_keeps_all_experts_on_each_node_where_slots_suffice(
    shape: tuple[int, int, int], num_nodes: int
) -> None:
    """Where C divides E, this is the layout of LAER-MoE's FSDP+EP."""
    node_size, capacity, num_experts = shape
    whole = num_nodes * node_size, capacity, num_experts
    layout = ExpertLayout.static(*whole, node_size)
    assert_legal(layout, whole)
    of_ranks = [layout.experts_of(rank) for rank in range(layout.num_ranks)]
    assert all(len({*experts}) == capacity for experts in of_ranks)
    if layout.num_slots > num_experts:
        for first in range(0, layout.num_ranks, node_size):
            assert {*sum(of_ranks[first : first + node_size], ())} == {*range(num_experts)}
        if num_experts % capacity == 0:
            part = num_experts // capacity
            theirs = [slot * part + 3 % node_size % part for slot in range(capacity)]
            assert [*of_ranks[3 % node_size]] == theirs


def test_random_layouts_are_the_same_on_every_machine() -> None:
    # Printed by these calls; they must hold for every NumPy version.
    layout = ExpertLayout.random(4, 3, 5, seed=(7, 1))
    assert layout.to_list() == [4, 0, 3, 0, 1, 4, 1, 2, 2, 2, 0, 3]
    layouts = [ExpertLayout.random_at_home(3, 4, 6, (7, seed)).to_list() for seed in range(60)]
    assert layouts[:2] == [
        [0, 1, 4, 5, 2, 3, 5, EMPTY, 4, 5, EMPTY, EMPTY],
        [0, 1, EMPTY, 4, 2, 3, EMPTY, EMPTY, 4, 5, EMPTY, 1],
    ]
    used = [sum(expert != EMPTY for expert in slots) - 6 for slots in layouts]
    assert used.count(0) >= 6 and used.count(6) >= 6 and set(used) == set(range(7))


@given(geometries(40, 64, spare=64) | home_geometries(48), st.integers(0, 1000))
def test_random_layouts_are_legal_repeatable_and_equal_by_content(
    geometry: Geometry, seed: int
) -> None:
    layout, shape = geometry.random_layout((seed, 2**40)), geometry.shape
    geometry.check_layout(layout)
    if not geometry.home_slots:
        assert_legal(layout, shape)
    for same in (
        geometry.random_layout((seed, 2**40)),
        ExpertLayout.from_slots(*shape, layout.to_list()),
        ExpertLayout.from_slots(*shape, layout.slot_expert_S),
        pickle.loads(pickle.dumps(layout)),
    ):
        assert same == layout
        assert hash(same) == hash(layout)
        assert same.digest == layout.digest


def test_digest_is_a_signed_64_bit_number_of_content_and_shape() -> None:
    # The same bytes under another shape are another layout.
    digests = {
        ExpertLayout.from_slots(2, 2, 2, [0, 1, 1, 0]).digest,
        ExpertLayout.from_slots(2, 2, 2, [0, 1, 0, 1]).digest,
        ExpertLayout.from_slots(4, 1, 2, [0, 1, 0, 1]).digest,
    }
    assert len(digests) == 3
    assert all(-(2**63) <= digest < 2**63 for digest in digests)
    # Printed by this expression: ranks on other machines must compute the same.
    assert ExpertLayout.from_slots(2, 2, 2, [0, 1, 0, 1]).digest == -6403159899245028533


@pytest.mark.parametrize(
    ("shape", "slots", "message"),
    [
        ((2, 2, 3), [0, 1, 2], "got 3 slots, but 2 ranks with 2 slots each need 4"),
        ((2, 2, 3), [], "got 0 slots"),
        ((2, 2, 3), [0, 1, 2, 3], r"expert 3; experts must be in 0\.\.2"),
        ((2, 2, 3), [0, 1, 2, -2], r"expert -2; experts must be in 0\.\.2, or -1"),
        # 65536 would wrap to expert 0 in int16.
        ((2, 2, 3), [65536, 1, 2, 0], "expert 65536"),
        ((2, 2, 3), [0, 1, 1, 0], "no slot holds expert 2"),
        ((2, 2, 3), [0.0, 1.0, 2.0, 0.0], "flat sequence of integers.*float64"),
        ((2, 2, 3), [[0, 1], [2, 0]], r"shape \(2, 2\)"),
        ((0, 2, 3), [0], "at least 1, got 0, 2 and 3"),
        ((2, 1, 3), [0, 1], r"capacity 1: the slots of 2 ranks .* use 2 to 3 \(default 3\)"),
        ((2, 4, 3), [0] * 8, "capacity 4: the slots of 2 ranks must hold each of 3 experts"),
        ((2, 20000, 32768), [0] * 40000, "at most 32767, got 32768"),
    ],
)
def test_illegal_layouts_are_refused_with_what_was_passed(
    shape: tuple[int, int, int], slots: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLayout.from_slots(*shape, slots)


def test_default_capacity_is_one_more_than_the_share_or_the_next_that_fits() -> None:
    for *shape, capacity in ((32, 8, 2), (4, 3, 2), (8, 64, 9), (4, 10, 4), (1, 8, 8), (2, 1, 1)):
        assert default_capacity(*shape) == capacity
    for *shape, capacity in ((2, 8, 6), (4, 8, 3), (2, 12, 8), (2, 3, 3)):
        assert default_capacity(*shape, multiple=4) == capacity


def test_homes_are_stocks_placement_and_leave_replica_slots_empty() -> None:
    layout = ExpertLayout.at_home(2, 3, 4)
    assert layout.to_list() == [0, 1, EMPTY, 2, 3, EMPTY]
    assert layout.replicas_E.tolist() == [1, 1, 1, 1]
    geometry = Geometry(2, 4, 3, 2, Sharding.EXPERTS)
    assert geometry.static_layout == layout and geometry.home_slots == 2
    geometry.check_layout(ExpertLayout.from_slots(2, 3, 4, [0, 1, 3, 2, 3, EMPTY]))


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([1, 0, EMPTY, 2, 3, EMPTY], id="homes in another order"),
        pytest.param([0, 1, 1, 2, 3, EMPTY], id="a replica at home"),
        pytest.param([0, 2, 3, 1, 2, 3], id="rows"),
        pytest.param([0, 1, 2, 2, 2, 3, EMPTY, EMPTY], id="a replica twice"),
    ],
)
def test_layouts_that_do_not_keep_experts_at_home_are_refused(slots: list[int]) -> None:
    capacity = len(slots) // 2
    layout = ExpertLayout.from_slots(2, capacity, 4, slots)
    says = "first 2 slots of each rank must have its home experts.* different experts of other"
    with pytest.raises(ValueError, match=says):
        Geometry(2, 4, capacity, 2, Sharding.EXPERTS).check_layout(layout)


def test_rows_refuse_empty_slots_and_homes_need_a_fitting_shape() -> None:
    with pytest.raises(ValueError, match="empty slots, which only --fsep-sharding experts"):
        Geometry(2, 4, 3, 2).check_layout(ExpertLayout.at_home(2, 3, 4))
    with pytest.raises(ValueError, match="4 experts cannot be at home on 3 ranks"):
        ExpertLayout.at_home(3, 2, 4)
    with pytest.raises(ValueError, match=r"capacity 2: each rank has 2 home experts.*use 3 to 4"):
        ExpertLayout.at_home(2, 2, 4)
