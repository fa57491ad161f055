"""Direct exchange: whole experts from their homes to the replica slots, and gradients back.

One All-to-All over the group each way. A home rank sends an expert once for each of its replicas.
Replica slots have experts in ascending order, then empty slots. Homes ascend with their experts, so
a whole restore arrives in place.

Legend: N ranks, E experts, C replica slots per rank, h home experts of a rank. R rows of a matrix,
K columns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.buffers import Buffers
from megatron_laer.runtime.comm.process_groups import Group
from megatron_laer.runtime.comm.stages import Stage


@dataclass(frozen=True)
class DirectIndex:
    """Experts that one rank sends and receives to fill the changed replica slots of a layout.

    Attributes:
        has_work: whether any rank of the group has a slot to fill.
        sent: home experts by their position on this rank, destination by destination.
        sent_N: number of experts sent to each rank.
        slots: replica slots to fill, in the order of arrival.
        received_N: number of experts received from each rank.
    """

    has_work: bool
    sent: list[int]
    sent_N: list[int]
    slots: list[int]
    received_N: list[int]

    @property
    def in_place(self) -> bool:
        """Return whether arrivals fill the first slots in order."""
        return self.slots == list(range(len(self.slots)))


def direct_index(before: Placed | None, after: Placed, rank: int) -> DirectIndex:
    """Index the replica slots of `after` whose expert differs from `before`, if that is given."""
    num_ranks, home_slots = after.geometry.num_ranks, after.geometry.home_slots
    expert_NC = after.replica_expert_S.reshape(num_ranks, -1).astype(np.int64)
    changed_NC = after.changed_S(before).reshape(num_ranks, -1)
    home_NC = np.where(changed_NC, expert_NC // home_slots, EMPTY)
    to, at = np.nonzero(home_NC == rank)
    order = np.argsort(home_NC[rank], kind="stable")
    slots = order[home_NC[rank][order] != EMPTY]
    return DirectIndex(
        has_work=bool(changed_NC.any()),
        sent=(expert_NC[to, at] % home_slots).tolist(),
        sent_N=np.bincount(to, minlength=num_ranks).tolist(),
        slots=slots.tolist(),
        received_N=np.bincount(home_NC[rank][slots], minlength=num_ranks).tolist(),
    )


def send_homes(
    index: DirectIndex,
    stage: Stage,
    buffers: Buffers,
    homes_hRK: Sequence[torch.Tensor],
    out_CRK: torch.Tensor,
) -> Generator[Group | None, None, tuple[int, int]]:
    """Fill the index's slots of `out_CRK` from all ranks' homes; return `Stage.all_to_all`'s."""
    size = out_CRK[0].numel()
    sent = _buffer(buffers, "send", len(index.sent), out_CRK)
    for part_RK, expert in zip(sent, index.sent, strict=True):
        part_RK.copy_(homes_hRK[expert])
    number = len(index.slots)
    received = out_CRK[:number]
    if not index.in_place:
        received = _buffer(buffers, "receive", number, out_CRK)
    moved = yield from stage.all_to_all(
        received.view(-1),
        sent.view(-1),
        [number * size for number in index.received_N],
        [number * size for number in index.sent_N],
    )
    if not index.in_place:
        for slot, part_RK in zip(index.slots, received, strict=True):
            out_CRK[slot].copy_(part_RK)
    return moved


def send_grads(
    index: DirectIndex, stage: Stage, buffers: Buffers, grad_CRK: torch.Tensor
) -> Generator[Group | None, None, tuple[torch.Tensor, tuple[int, int]]]:
    """Send the gradients of this rank's replicas home, the way back of `send_homes`.

    Returns:
        [n, R, K], the gradients of the replicas that `index.sent` names, rank by rank; and
        `Stage.all_to_all`'s.
    """
    size, number = grad_CRK[0].numel(), len(index.slots)
    if index.in_place:
        sent = grad_CRK[:number]
    else:
        sent = _buffer(buffers, "send", number, grad_CRK)
        for part_RK, slot in zip(sent, index.slots, strict=True):
            part_RK.copy_(grad_CRK[slot])
    received = _buffer(buffers, "receive", len(index.sent), grad_CRK)
    moved = yield from stage.all_to_all(
        received.view(-1),
        sent.reshape(-1),
        [number * size for number in index.sent_N],
        [number * size for number in index.received_N],
    )
    return received, moved


def _buffer(buffers: Buffers, name: str, number: int, like_CRK: torch.Tensor) -> torch.Tensor:
    """Return a buffer for experts; it grows with the largest number so far."""
    _, rows, columns = like_CRK.shape
    num_bytes = number * rows * columns * like_CRK.element_size()
    buffer = buffers.buffer(name, num_bytes, like_CRK.device)
    return buffer[:num_bytes].view(like_CRK.dtype).view(number, rows, columns)
