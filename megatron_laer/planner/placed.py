"""A layout in its group, and the rules by which a restore fetches its experts.

A restore fetches the replica slots whose expert changed, except empty ones; through nodes, it
fetches each distinct expert of a node once. `runtime` moves the weights, and `planner.traffic` has
the formulas.

Legend: N ranks, E experts, C replica slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout


def row_bounds(rows: int, num_ranks: int) -> list[int]:
    """Return the N + 1 bounds of the ranks' row blocks, which differ by at most one row."""
    return [rank * rows // num_ranks for rank in range(num_ranks + 1)]


@dataclass(frozen=True)
class Placed:
    """A layout, where it lies: in a group with nodes, whose ranks own rows of experts.

    With `Sharding.ROWS` every rank owns a block of rows of each expert, and all slots are replica
    slots. With `Sharding.EXPERTS` one rank owns all rows of an expert, in one of its home slots,
    whose experts never move.

    Attributes:
        quantised: whether the layer's experts travel as payloads, where the run's do.
    """

    layout: ExpertLayout
    geometry: Geometry
    quantised: bool = True

    def __post_init__(self) -> None:
        self.geometry.check_shape_of(self.layout)

    @cached_property
    def replica_expert_S(self) -> npt.NDArray[np.int16]:
        """Return the expert of each replica slot, or `EMPTY`, rank by rank."""
        slots_NC = self.layout.slot_expert_S.reshape(self.geometry.num_ranks, -1)
        return slots_NC[:, self.geometry.home_slots :].reshape(-1)

    @cached_property
    def filled_S(self) -> Bool:
        """Return the replica slots with an expert."""
        return np.asarray(self.replica_expert_S != EMPTY)

    @cached_property
    def has_replicas(self) -> bool:
        """Return whether any rank of the group fetches an expert."""
        return bool(self.filled_S.any())

    def changed_S(self, before: Placed | None) -> Bool:
        """Return the replica slots to fetch where ranks keep the experts of `before`, if any."""
        if before is None:
            return self.filled_S
        return np.asarray(self.filled_S & (self.replica_expert_S != before.replica_expert_S))


@dataclass(frozen=True, eq=False)
class NodeSources:
    """Sources of the distinct experts of each node's changed slots.

    Pairs of a node and an expert are numbered node·E + expert and ascend. They come from the slices
    of all ranks, or, shared, from a slot of the same node under the layout before (`shared_slots`).
    """

    fetched_pairs: Int64
    shared_pairs: Int64
    shared_slots: Int64


def node_sources(
    placed: Placed, node_size: int, changed_S: Bool, before: Placed | None = None
) -> NodeSources:
    """Return the experts that cross nodes in a restore by node, and those that nodes have.

    `before` is the layout under which ranks keep restored experts; None if they keep nothing.
    """
    num_experts = placed.geometry.num_experts
    node_S = np.arange(changed_S.size) // (node_size * placed.geometry.replica_slots)
    pair_S = node_S * num_experts + placed.replica_expert_S
    wanted = np.unique(pair_S[changed_S & placed.filled_S])
    if before is None:
        return NodeSources(wanted, wanted[:0], wanted[:0])
    pair_S = np.where(before.filled_S, node_S * num_experts + before.replica_expert_S, EMPTY)
    by_pair = np.argsort(pair_S, kind="stable")
    first = np.searchsorted(pair_S[by_pair], wanted)
    count = np.searchsorted(pair_S[by_pair], wanted, side="right") - first
    held = count > 0
    # Not always the first of an expert's slots, or the first rank of a node would hand out most.
    slots = by_pair[first[held] + wanted[held] % num_experts % count[held]]
    return NodeSources(wanted[~held], wanted[held], slots)
