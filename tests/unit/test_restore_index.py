"""The index of a restore equals the worked example of its file, on every rank."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.restore import RestoreIndex, Run, restore_index

pytestmark = pytest.mark.unit

BEFORE = ExpertLayout.from_slots(4, 2, 4, [0, 1, 0, 2, 3, 0, 3, 2])
AFTER = ExpertLayout.from_slots(4, 2, 4, [3, 1, 1, 2, 3, 0, 3, 2])


def index_of(rank: int, before: ExpertLayout | None = BEFORE, node_size: int = 2) -> RestoreIndex:
    return restore_index(before, AFTER, node_size, rank, torch.device("cpu"))


def test_the_worked_example() -> None:
    index = index_of(0)
    assert index.has_work
    assert index.sent_experts.tolist() == [3]
    assert index.fetched_M == [1, 0]
    assert index.shared_slots == [1]
    assert index.shared_G == [1, 0]
    assert index.position_n.tolist() == [0, 1]
    assert index.restored_G == [1, 1]
    assert index.runs == [Run(0, slice(0, 1))]


def test_every_rank_sends_what_node_0_fetches_and_node_1_receives_nothing() -> None:
    for rank in range(4):
        index = index_of(rank)
        assert index.sent_experts.tolist() == [3] and index.fetched_M == [1, 0]
        assert index.restored_G == ([1, 1] if rank < 2 else [0, 0])
        assert index.shared_slots == ([1] if rank == 0 else [])
    assert index_of(1).runs == [Run(0, slice(0, 1))]
    assert index_of(2).runs == []


def test_without_a_layout_before_all_slots_are_restored_from_slices() -> None:
    index = index_of(3, before=None)
    assert index.fetched_M == [3, 3]  # experts 1, 2, 3 and 0, 2, 3
    assert index.sent_experts.tolist() == [1, 2, 3, 0, 2, 3]
    assert index.shared_G == [0, 0]
    assert index.position_n.tolist() == [2, 0, 2, 1]
    assert index.runs == [Run(0, slice(0, 2))]


def test_one_node_fetches_and_shares_nothing() -> None:
    index = index_of(1, node_size=4)
    assert index.fetched_M == [0] and index.shared_G == [0, 0, 0, 0]
    assert index.position_n.tolist() == [3, 1]  # the experts themselves
