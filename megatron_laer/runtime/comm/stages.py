"""All-to-Alls of an exchange: over all ranks, between nodes, or between the ranks of a node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_laer.planner.hops import Link
from megatron_laer.runtime.comm.process_groups import FSEPGroups


@dataclass
class ExchangeCount:
    """Bytes that this rank received from others; callers count their restores and passes."""

    restores: int = 0
    changes: int = 0
    reduces: int = 0
    backwards: int = 0
    restore_intra_bytes: int = 0
    restore_inter_bytes: int = 0
    reduce_intra_bytes: int = 0
    reduce_inter_bytes: int = 0
    restore_collectives: int = 0
    reduce_collectives: int = 0

    @property
    def restore_bytes(self) -> int:
        return self.restore_intra_bytes + self.restore_inter_bytes

    @property
    def reduce_bytes(self) -> int:
        return self.reduce_intra_bytes + self.reduce_inter_bytes

    @property
    def received_bytes(self) -> int:
        return self.restore_bytes + self.reduce_bytes

    def add_restore(self, intra_bytes: int, inter_bytes: int) -> None:
        self.restore_intra_bytes += intra_bytes
        self.restore_inter_bytes += inter_bytes
        self.restore_collectives += 1

    def add_reduce(self, intra_bytes: int, inter_bytes: int) -> None:
        self.reduce_intra_bytes += intra_bytes
        self.reduce_inter_bytes += inter_bytes
        self.reduce_collectives += 1


@dataclass(frozen=True)
class Stage:
    """Communicator, this rank's position in it, and the range of its ranks on the same machine."""

    group: dist.ProcessGroup
    position: int
    same_machine: slice

    def bytes_from(self, rows_P: list[int], received_ZK: torch.Tensor) -> tuple[int, int]:
        """Return the bytes that arrived from other ranks of the same machine, and from others."""
        row_bytes = received_ZK.shape[1] * received_ZK.itemsize
        intra = sum(rows_P[self.same_machine])
        return (intra - rows_P[self.position]) * row_bytes, (sum(rows_P) - intra) * row_bytes


def stage_of(groups: FSEPGroups, exchange: str, link: Link) -> Stage | None:
    """Return the stage of a link for `parameters` or `gradients`; None if it has one rank."""
    node, local_rank = divmod(groups.rank, groups.node_size)
    if link is Link.INSIDE:
        if groups.node_size == 1:
            return None
        group = getattr(groups, f"{exchange}_intra_node")
        return Stage(group, local_rank, slice(0, groups.node_size))
    if link is Link.BETWEEN and groups.node_size > 1:
        return Stage(getattr(groups, f"{exchange}_inter_node"), node, slice(node, node + 1))
    if groups.size == 1:
        return None
    first = node * groups.node_size
    same_machine = slice(first, first + groups.node_size)
    return Stage(getattr(groups, exchange), groups.rank, same_machine)
