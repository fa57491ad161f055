"""Rules by which a restore fetches experts, common to exchanges and traffic formulas.

Every rank holds a block of rows of every expert's matrices (its slice). A restore fetches the slots
whose expert changed, except empty ones; through nodes, it fetches each distinct expert of a node
once. `runtime` moves the weights, and `planner.traffic` has the formulas.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.layout import EMPTY, ExpertLayout


def row_bounds(rows: int, num_ranks: int) -> list[int]:
    """Return the N + 1 bounds of the ranks' row blocks, which differ by at most one row."""
    return [rank * rows // num_ranks for rank in range(num_ranks + 1)]


@dataclass(frozen=True)
class ReplicaSlots:
    """Slots of a layout whose experts are fetched: all, or those behind each rank's home slots."""

    layout: ExpertLayout
    home_slots: int = 0

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @property
    def num_experts(self) -> int:
        return self.layout.num_experts

    @property
    def capacity(self) -> int:
        return self.layout.capacity - self.home_slots

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.capacity

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_ranks, self.capacity, self.num_experts

    @property
    def have_homes(self) -> bool:
        return self.home_slots > 0

    @property
    def slot_expert_S(self) -> npt.NDArray[np.int16]:
        """Return the expert of each of these slots, or `EMPTY`, rank by rank."""
        slots_NC = self.layout.slot_expert_S.reshape(self.num_ranks, -1)
        return slots_NC[:, self.home_slots :].reshape(-1)


def changed_slots(before: ExpertLayout | ReplicaSlots, after: ExpertLayout | ReplicaSlots) -> Bool:
    """Return the slots that get another expert, bool [S]; not those that become empty."""
    if before.shape != after.shape:
        shapes = [before.shape, after.shape]
        raise ValueError(f"layouts of different (ranks, capacity, experts): {shapes}")
    differs_S = before.slot_expert_S != after.slot_expert_S
    return np.asarray(filled_slots(after) & differs_S)


def filled_slots(layout: ExpertLayout | ReplicaSlots) -> Bool:
    """Return the slots with an expert, bool [S]."""
    return np.asarray(layout.slot_expert_S != EMPTY)


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
    layout: ExpertLayout | ReplicaSlots,
    node_size: int,
    changed_S: Bool,
    before: ExpertLayout | ReplicaSlots | None = None,
) -> NodeSources:
    """Return the experts that cross nodes in a restore by node, and those that nodes have.

    `before` is the layout under which ranks keep restored experts; None if they keep nothing.
    """
    num_experts = layout.num_experts
    node_S = np.arange(layout.num_slots) // (node_size * layout.capacity)
    wanted = np.unique(
        (node_S * num_experts + layout.slot_expert_S)[changed_S & filled_slots(layout)]
    )
    if before is None:
        return NodeSources(wanted, wanted[:0], wanted[:0])
    pair_S = np.where(filled_slots(before), node_S * num_experts + before.slot_expert_S, EMPTY)
    by_pair = np.argsort(pair_S, kind="stable")
    first = np.searchsorted(pair_S[by_pair], wanted)
    count = np.searchsorted(pair_S[by_pair], wanted, side="right") - first
    held = count > 0
    # Not always the first of an expert's slots, or the first rank of a node would hand out most.
    slots = by_pair[first[held] + wanted[held] % num_experts % count[held]]
    return NodeSources(wanted[~held], wanted[held], slots)
