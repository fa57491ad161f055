"""Exchanges in steps end with their result, however many All-to-Alls they have."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.runtime.comm.buffers import Workspace
from megatron_laer.runtime.comm.steps import Steps, finish


def exchange(number: int, done: list[str]) -> Steps:
    for at in range(number):
        done.append(f"send {at}")
        yield at + 1 < number
        done.append(f"unpack {at}")
    return torch.tensor(number)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_exchange_runs_to_its_end(number: int) -> None:
    done: list[str] = []
    assert finish(exchange(number, done)) == torch.tensor(number)
    assert done == [f"{part} {at}" for at in range(number) for part in ("send", "unpack")]


def test_a_buffer_grows_where_it_has_no_bound_and_is_allocated_once_for_its_bound() -> None:
    def take(space: Workspace, rows: int, most_bytes: int | None) -> torch.Tensor:
        return space.take("send", (rows, 1), torch.uint8, torch.device("cpu"), most_bytes)

    growing, bounded = Workspace(), Workspace()
    assert [len(take(growing, rows, None)) for rows in (2, 8, 4)] == [2, 8, 4]
    assert growing.num_bytes == 8
    memory = {take(bounded, rows, 12).data_ptr() for rows in (2, 8, 4)}
    assert len(memory) == 1 and bounded.num_bytes == 12
    with pytest.raises(AssertionError, match="send: 13 bytes exceed the bound 12"):
        take(bounded, 13, 12)
