"""All-to-Alls of an exchange: over all ranks, between nodes, or between the ranks of a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_laer.planner.hops import Link
from megatron_laer.runtime.comm.buffers import Workspace
from megatron_laer.runtime.comm.process_groups import FSEPGroups


@dataclass
class ExchangeCount:
    """Restores, changes, reduces and backward passes of layers, as callers count them."""

    restores: int = 0
    changes: int = 0
    reduces: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class Stage:
    """Communicator, this rank's position in it, and the range of its ranks on the same machine."""

    group: dist.ProcessGroup
    position: int
    same_machine: slice

    def all_to_all(
        self,
        received_ZK: torch.Tensor,
        sent_ZK: torch.Tensor,
        received_P: list[int],
        sent_P: list[int],
    ) -> None:
        """Exchange rows, as many with each rank of the communicator."""
        dist.all_to_all_single(received_ZK, sent_ZK, received_P, sent_P, group=self.group)


@dataclass
class Direction:
    """All restores of a rank, or all reduces, and their All-to-Alls so far.

    Attributes:
        stages: by link; None for links of one rank.
        intra_bytes: received from other ranks of the same machine.
        inter_bytes: received from other machines.
    """

    stages: Mapping[int, Stage | None]
    workspace: Workspace = field(default_factory=Workspace)
    intra_bytes: int = 0
    inter_bytes: int = 0
    collectives: int = 0

    @property
    def received_bytes(self) -> int:
        return self.intra_bytes + self.inter_bytes

    def count(self, stage: Stage, rows_P: list[int], row_bytes: int) -> None:
        """Count an All-to-All by the rows from each rank."""
        intra = sum(rows_P[stage.same_machine])
        self.intra_bytes += (intra - rows_P[stage.position]) * row_bytes
        self.inter_bytes += (sum(rows_P) - intra) * row_bytes
        self.collectives += 1


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
