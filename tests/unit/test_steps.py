"""Exchanges in steps: side by side, with one launch for the All-to-Alls of all."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.runtime.comm.buffers import Workspace
from megatron_laer.runtime.comm.steps import SideBySide, Steps, finish, one_launch

CPU = torch.device("cpu")


def group_of(done: list[str], *, is_nccl: bool) -> Any:
    group = mock.Mock()
    group._get_backend.return_value.supports_coalescing = is_nccl
    group._start_coalescing.side_effect = lambda _: done.append("[")
    group._end_coalescing.side_effect = lambda _: done.append("]")
    return group


def exchange(name: str, groups: list[Any], done: list[str]) -> Steps:
    done.append(f"pack {name}")
    for stage, group in enumerate(groups):
        yield group
        done.append(f"send {name}{stage}")
        yield group if stage + 1 < len(groups) else None
        done.append(f"unpack {name}{stage}")
    return torch.tensor(len(groups))


def test_nccl_launches_collectives_of_a_block_as_one() -> None:
    for is_nccl, expected in ((True, ["[", "both", "]"]), (False, ["both"])):
        done: list[str] = []
        with one_launch(group_of(done, is_nccl=is_nccl), CPU):
            done.append("both")
        assert done == expected


def test_exchanges_side_by_side_send_together_and_stop_before_what_waits() -> None:
    done: list[str] = []
    groups = [group_of(done, is_nccl=True) for _ in range(2)]
    both = SideBySide([exchange("a", groups, done), exchange("b", groups, done)], CPU)
    assert both.next() and both.results == {} and both.has_more
    assert done == ["pack a", "pack b", "[", "send a0", "send b0", "]"]
    done.clear()
    assert both.next() and not both.has_more
    assert done == ["unpack a0", "unpack b0", "[", "send a1", "send b1", "]"]
    done.clear()
    assert not both.next()
    assert done == ["unpack a1", "unpack b1"]
    assert both.results == {0: torch.tensor(2), 1: torch.tensor(2)}
    assert groups[0] is not groups[1]


def test_an_exchange_without_an_all_to_all_ends_at_once() -> None:
    done: list[str] = []
    both = SideBySide([exchange("a", [], done)], CPU)
    assert not both.next()
    assert both.results == {0: torch.tensor(0)} and done == ["pack a"]
    assert not both.next() and both.results == {0: torch.tensor(0)}  # asked again for its end
    assert finish(exchange("b", [group_of(done, is_nccl=False)], done)) == torch.tensor(1)
    assert done == ["pack a", "pack b", "send b0", "unpack b0"]


def test_exchanges_of_different_steps_are_refused() -> None:
    one, other = (group_of([], is_nccl=False) for _ in range(2))
    both = SideBySide([exchange("a", [one], []), exchange("b", [other], [])], CPU)
    with pytest.raises(AssertionError, match="exchanges of one layout have different steps"):
        both.next()


def test_exchanges_side_by_side_have_buffers_of_their_own() -> None:
    workspace = Workspace()
    of_bytes = None, 1, CPU
    with workspace.lent(*of_bytes) as first:
        eight = first("send", 8, torch.uint8)
        with workspace.lent(*of_bytes) as second:
            four = second("send", 4, torch.uint8)
        with workspace.lent(*of_bytes) as third:
            assert third("send", 4, torch.uint8).data_ptr() == four.data_ptr()
    with workspace.lent(*of_bytes) as again:
        assert again("send", 8, torch.uint8).data_ptr() == eight.data_ptr()
    assert workspace.num_bytes == 12
