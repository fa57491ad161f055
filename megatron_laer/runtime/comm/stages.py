"""All-to-Alls of an exchange: a stage between nodes, and one between the ranks of a node."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_laer.runtime.comm.blocks import RowBlocks
from megatron_laer.runtime.comm.buffers import MatrixBuffers
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group


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

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        sizes: list[int],
        sent_sizes: list[int],
        *,
        more: bool = False,
    ) -> Generator[Group | None, None, tuple[int, int]]:
        """Exchange flat tensors; return the bytes received inside the machine and from others.

        `more` tells that the exchange has another All-to-All, which waits for this one.
        """
        yield self.group
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group)
        yield self.group if more else None
        intra = sum(sizes[self.same_machine])
        element = received.element_size()
        return (intra - sizes[self.position]) * element, (sum(sizes) - intra) * element


@dataclass(frozen=True)
class Stages:
    """Stages between peers on all nodes and inside a node; None for one that moves nothing."""

    inter_node: Stage | None
    intra_node: Stage | None

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(stage.group for stage in (self.inter_node, self.intra_node) if stage)


@dataclass(frozen=True)
class DataPath:
    """Data path of one matrix on this rank; `count` is called after each `Stage.all_to_all`."""

    node: int
    local_rank: int
    stages: Stages
    blocks: RowBlocks
    buffers: MatrixBuffers
    count: Callable[[int, int], None]


def whole_group(groups: FSEPGroups, group: Group) -> Stage:
    """Return the stage of an All-to-All over the whole group."""
    first = groups.rank - groups.rank % groups.node_size
    return Stage(group, groups.rank, slice(first, first + groups.node_size))
