"""A `Stage` is one All-to-All of an exchange: between nodes, or between the ranks of a node.

It does not decide what is sent; `ExchangeCount` adds up what the stages received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class ExchangeCount:
    """Counts what this rank received from others, for metrics and tests of the documented formulas.

    Counted from the sizes that collectives are given. Restores, changes of what was restored,
    reduces and backward passes are counted by their caller, since a layer restores several matrices
    at once.
    """

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
        """Sum the bytes received by restores, over any link."""
        return self.restore_intra_bytes + self.restore_inter_bytes

    @property
    def reduce_bytes(self) -> int:
        """Sum the bytes received by reduces, over any link."""
        return self.reduce_intra_bytes + self.reduce_inter_bytes

    def add_restore(self, intra_bytes: int, inter_bytes: int) -> None:
        """Count one collective of a restore."""
        self.restore_intra_bytes += intra_bytes
        self.restore_inter_bytes += inter_bytes
        self.restore_collectives += 1

    def add_reduce(self, intra_bytes: int, inter_bytes: int) -> None:
        """Count one collective of a reduce."""
        self.reduce_intra_bytes += intra_bytes
        self.reduce_inter_bytes += inter_bytes
        self.reduce_collectives += 1


@dataclass(frozen=True)
class Stage:
    """Holds a communicator, this rank's position in it, and which of its ranks share its machine.

    Attributes:
        position: of this rank in the group.
        same_machine: the range of ranks in the group that are on this rank's machine.
    """

    group: dist.ProcessGroup
    position: int
    same_machine: slice

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, sizes: list[int], sent_sizes: list[int]
    ) -> tuple[int, int]:
        """Exchange flat tensors; return the bytes received inside the machine and from others."""
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group)
        intra = sum(sizes[self.same_machine])
        element = received.element_size()
        return (intra - sizes[self.position]) * element, (sum(sizes) - intra) * element


@dataclass(frozen=True)
class Stages:
    """Holds the stages of a restore or of a reduce; None for one that moves nothing.

    Attributes:
        inter_node: between the ranks of one local rank on all nodes.
        intra_node: between the ranks of one node.
    """

    inter_node: Stage | None
    intra_node: Stage | None
