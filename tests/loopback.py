"""Ranks of an exchange in one process: their All-to-Alls copy from one to the other.

Each rank's exchange runs until its next All-to-All. Once all ranks of a communicator are there, it
is carried out, and they go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_laer.arrays import Int64
from megatron_laer.runtime.comm.streams import Steps


class Communicator(NamedTuple):
    name: str
    ranks: tuple[int, ...]


class _Call(NamedTuple):
    received: torch.Tensor
    sent: torch.Tensor
    received_P: list[int]
    sent_P: list[int]

    @property
    def elements_P(self) -> Int64:
        """Return the elements that this rank sends to each."""
        return np.array(self.sent_P) * self.sent.shape[1:].numel()


# By the ranks of a communicator, its All-to-Alls in order: elements from each rank to each, [P, P],
# and their dtype.
Moved = dict[tuple[int, ...], list[tuple[Int64, torch.dtype]]]


def groups_of(num_ranks: int, node_size: int) -> list[Any]:
    """Return each rank's process groups, as `process_groups.create_groups` makes them."""
    found = []
    for rank in range(num_ranks):
        node, local_rank = divmod(rank, node_size)
        of_rank: dict[str, Any] = {"rank": rank, "size": num_ranks, "node_size": node_size}
        for name in ("parameters", "gradients"):
            inside = range(node * node_size, (node + 1) * node_size)
            between = range(local_rank, num_ranks, node_size)
            of_rank[name] = Communicator(name, tuple(range(num_ranks)))
            of_rank[f"{name}_intra_node"] = Communicator(name, tuple(inside))
            of_rank[f"{name}_inter_node"] = Communicator(name, tuple(between))
        found.append(SimpleNamespace(**of_rank))
    return found


@torch.no_grad()
def run(exchanges: Sequence[Steps], moved: Moved | None = None) -> list[torch.Tensor]:
    """Run the exchange of each rank to its end; return the results, and add to what was moved."""
    results: dict[int, torch.Tensor] = {}
    waiting: dict[int, tuple[Communicator, _Call]] = {}
    called: list[tuple[Communicator, _Call]] = []
    goes_on: dict[int, bool] = {}  # whether a rank's exchange has another All-to-All, as it says

    def call(*given: Any, group: Any) -> None:
        one = _Call(*given)
        assert not _overlap(one.received, one.sent), "rows arrive where others are sent from"
        called.append((group, one))

    with mock.patch.object(dist, "all_to_all_single", call):
        while len(results) < len(exchanges):
            for rank, steps in enumerate(exchanges):
                while rank not in results and rank not in waiting:
                    try:
                        following = next(steps)
                    except StopIteration as end:
                        results[rank] = end.value
                        assert not goes_on.get(rank), "an All-to-All was announced, and is none"
                    if called:
                        waiting[rank] = called.pop()
                        assert goes_on.get(rank, True), "an All-to-All was not announced"
                        goes_on[rank] = following
            complete = {
                group
                for group, _ in waiting.values()
                if all(rank in waiting and waiting[rank][0] == group for rank in group.ranks)
            }
            assert complete or len(results) == len(exchanges), "ranks wait for each other"
            for group in complete:
                calls = [waiting.pop(rank)[1] for rank in group.ranks]
                _all_to_all(calls)
                if moved is not None:
                    elements_PP = np.stack([one.elements_P for one in calls])
                    moved.setdefault(group.ranks, []).append((elements_PP, calls[0].sent.dtype))
    return [results[rank] for rank in range(len(exchanges))]


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    bounds = [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in (one, other)]
    return max(first for first, _ in bounds) < min(last for _, last in bounds)


def _all_to_all(calls: Sequence[_Call]) -> None:
    parts_PP = [call.sent.split(call.sent_P) for call in calls]
    for rank, call in enumerate(calls):
        arrived = [parts_P[rank] for parts_P in parts_PP]
        assert [len(part) for part in arrived] == call.received_P, "ranks disagree on sizes"
        assert {part.dtype for part in arrived} == {call.received.dtype}
        call.received.copy_(torch.cat(arrived))
