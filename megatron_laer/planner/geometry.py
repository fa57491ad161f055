"""Geometry: ranks, experts, slots and nodes of a planning problem, without loads or speeds.

Legend: N ranks, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.layout import (
    EMPTY,
    ExpertLayout,
    check_home,
    check_shape,
    default_capacity,
)


@dataclass(frozen=True)
class Geometry:
    """Shape of a layer's planning problem; G divides N, and ranks r*G..r*G+G-1 share a node.

    With `Sharding.EXPERTS` the first `home_slots` slots of a rank have its home experts, in stock's
    placement. A replica slot has an expert of another rank, or is empty.
    """

    num_ranks: int
    num_experts: int
    capacity: int
    node_size: int
    sharding: Sharding = Sharding.ROWS

    def __post_init__(self) -> None:
        check_shape(self.num_ranks, self.capacity, self.num_experts)
        check_node_size(self.num_ranks, self.node_size)
        if self.sharding == Sharding.EXPERTS:
            check_home(self.num_ranks, self.capacity, self.num_experts)

    @cached_property
    def home_slots(self) -> int:
        """Return E/N where experts have a home, else 0: every slot is a replica slot."""
        return self.num_experts // self.num_ranks if self.sharding == Sharding.EXPERTS else 0

    @cached_property
    def replica_slots(self) -> int:
        """Return the number of a rank's slots whose experts are fetched."""
        return self.capacity - self.home_slots

    @property
    def static_layout(self) -> ExpertLayout:
        """Return the layout without a planner, which is also the first one of a run."""
        if self.sharding == Sharding.EXPERTS:
            return ExpertLayout.at_home(*self.shape)
        return ExpertLayout.static(*self.shape, self.node_size)

    def random_layout(self, seed: tuple[int, ...]) -> ExpertLayout:
        """Return a random legal layout, the same on every machine for one seed."""
        if self.sharding == Sharding.EXPERTS:
            return ExpertLayout.random_at_home(*self.shape, seed)
        return ExpertLayout.random(*self.shape, seed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (N, C, E), as of a layout."""
        return self.num_ranks, self.capacity, self.num_experts

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.capacity

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.node_size

    def check_shape_of(self, layout: ExpertLayout) -> None:
        if layout.shape != self.shape:
            raise ValueError(
                f"layout is for (ranks, capacity, experts) = {layout.shape}, the planner for "
                f"{self.shape}"
            )

    def check_layout(self, layout: ExpertLayout) -> None:
        self.check_shape_of(layout)
        slots_NC = layout.slot_expert_S.reshape(self.num_ranks, self.capacity)
        if self.sharding == Sharding.ROWS:
            if (slots_NC == EMPTY).any():
                raise ValueError(
                    "the layout has empty slots, which only --fsep-sharding experts can use"
                )
            return
        home = self.home_slots
        home_NC = np.arange(self.num_experts).reshape(self.num_ranks, home)
        replicas_NC = np.sort(slots_NC[:, home:], axis=1)
        twice_NC = (replicas_NC[:, 1:] == replicas_NC[:, :-1]) & (replicas_NC[:, 1:] != EMPTY)
        own_NC = replicas_NC // home == np.arange(self.num_ranks)[:, None]
        if (slots_NC[:, :home] != home_NC).any() or own_NC.any() or twice_NC.any():
            raise ValueError(
                f"the layout does not fit --fsep-sharding experts: the first {home} slots of each "
                "rank must have its home experts, and the others different experts of other ranks"
            )

    def check_counts(self, shape: tuple[int, ...]) -> None:
        if shape != (self.num_ranks, self.num_experts):
            raise ValueError(
                f"counts_NE has shape {shape}, expected [ranks, experts] = "
                f"{(self.num_ranks, self.num_experts)}"
            )

    def checked_counts(self, counts_NE: Int64) -> Int64:
        """Return counts in the format of the native code, which refuses negative ones."""
        self.check_counts(counts_NE.shape)
        return np.ascontiguousarray(counts_NE, dtype=np.int64)


def resolve_geometry(
    num_experts: int,
    num_ranks: int,
    capacity: int | None,
    node_size: int,
    *,
    sharding: Sharding = Sharding.ROWS,
    multiple: int = 1,
    flags: tuple[str, str] = ("capacity", "node size"),
) -> Geometry:
    """Return the geometry of a layer, with the default number of slots if none is given."""
    if capacity is None:
        capacity = default_capacity(num_ranks, num_experts, multiple)
    if sharding == Sharding.EXPERTS:  # before the wider bounds of rows
        check_home(num_ranks, capacity, num_experts, flags[0])
    check_shape(num_ranks, capacity, num_experts, flags[0], multiple)
    check_node_size(num_ranks, node_size, flags[1])
    return Geometry(num_ranks, num_experts, capacity, node_size, sharding)


def check_node_size(num_ranks: int, node_size: int, flag: str = "node size") -> None:
    """Reject a node size that would leave a partly filled node."""
    if node_size < 1 or num_ranks % node_size != 0:
        works = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ValueError(
            f"{flag} {node_size} does not divide the {num_ranks} ranks; use one of {works}"
        )


def experts_of_a_word(num_experts: int) -> int:
    """Return how many experts' counts one word checks in the exchange of counts: 4 if it can."""
    return math.gcd(num_experts, 4)


def counts_bytes(num_experts: int) -> int:
    """Return a rank's bytes in the exchange of counts: counts, their words and three tags."""
    return 8 * (num_experts + num_experts // experts_of_a_word(num_experts) + 3)
