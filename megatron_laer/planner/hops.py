"""Exchanges of experts as chains of holdings, and the hops between neighbours in a chain.

A *holding* says which ranks have which rows of which experts. Its places have `width` ranks each,
which share the rows of the place's experts. Rank l of a place has the blocks l, l + width, … of N.

| holding | places | experts of a place |
|---|---|---|
| owners, rows | one of all N ranks | all |
| owners, homes | each rank | its home experts |
| spread | one of all N ranks, or each node | those that homes send on, or the node's homes |
| nodes | each node, G ranks | the distinct experts that its slots want |
| slots | each rank | those to fetch |

A *way* is the chain from owners to slots. `flat` has nothing between them, `node` has nodes. With
homes the spread comes before the nodes (a *relay*). Over all ranks it evens out what all ranks
send, inside a node what those of the node do. A *hop* is the join of two neighbours: each wanted
expert, and the place that it is taken from. The slots as they were before are a holding too. Nodes
take from there what they have, so that only other experts cross nodes.

The reduce is the chain walked back: where a hop sends one block to several ranks, it sums.

`native/hops.cpp` makes the hops.

Legend: N ranks, C replica slots per rank, G ranks per node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.native_core import native


class Link(IntEnum):
    """Ranks that a hop connects: all, those of one local rank on all nodes, or those of a node."""

    ALL = 0
    BETWEEN = 1
    INSIDE = 2

    def peers(self, geometry: Geometry) -> tuple[int, int]:
        """Return the number of a rank's peers in its node, and in other nodes."""
        ranks, node_size = geometry.num_ranks, geometry.node_size
        between = 0, geometry.num_nodes - 1
        return ((node_size - 1, ranks - node_size), between, (node_size - 1, 0))[self]


@dataclass(frozen=True, eq=False)  # `way_of` makes each once
class Way:
    """Chain of holdings of a geometry, from the owners to the slots.

    Attributes:
        widths: of all holdings.
    """

    geometry: Geometry
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the name in docs/internals/communication.md."""
        if len(self.widths) == 2:
            return "direct" if self.is_direct else "flat"
        if self.spreads_in_nodes:
            return "relay in nodes"
        return "relay" if self.geometry.home_slots else "node"

    @cached_property
    def is_direct(self) -> bool:
        """Return whether whole experts go from their homes to the slots."""
        return self.geometry.home_slots > 0 and len(self.widths) == 2

    @cached_property
    def spreads_in_nodes(self) -> bool:
        """Return whether homes spread experts over their own node."""
        return self.geometry.home_slots > 0 and 1 < self.widths[1] < self.geometry.num_ranks

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Return the link of each hop, from the owners on."""
        *others, last = (Link.ALL,) * (len(self.widths) - 1)
        if self.spreads_in_nodes:
            others[1] = Link.INSIDE
        if others and self.widths[-2] < self.geometry.num_ranks:
            return *others[1:], Link.BETWEEN, Link.INSIDE
        return *others, last

    @property
    def buffers_grow(self) -> bool:
        """Return whether buffers are as large as layouts need, not as any layout may need."""
        return self.is_direct or self.spreads_in_nodes

    @cached_property
    def native(self) -> native.Way:
        geometry = self.geometry
        blocks = 1 if self.is_direct else geometry.num_ranks
        sizes = geometry.num_ranks, geometry.num_experts, geometry.capacity, geometry.node_size
        return native.Way(*sizes, geometry.home_slots, self.widths, self.links, blocks)


@lru_cache(maxsize=256)
def way_of(geometry: Geometry, algorithm: ExchangeAlgorithm) -> Way:
    """Return the chain by which an algorithm moves experts in a geometry."""
    ranks, home_slots = geometry.num_ranks, geometry.home_slots
    owners = 1 if home_slots else ranks
    if algorithm == ExchangeAlgorithm.FLAT:
        return Way(geometry, (owners, 1))
    spread = (ranks,) if home_slots else ()
    nodes = (geometry.node_size,) if geometry.num_nodes > 1 else ()
    return Way(geometry, (owners, *spread, *nodes, 1))


@lru_cache(maxsize=64)
def ways_of(geometry: Geometry) -> tuple[Way, ...]:
    """Return all ways that a layout may take; the last has room for every layout.

    Each word has its way, and homes on several nodes have one more, a relay inside nodes.
    """
    *others, last = (way_of(geometry, algorithm) for algorithm in ExchangeAlgorithm)
    node_size = geometry.node_size
    if geometry.home_slots and 1 < node_size < geometry.num_ranks:
        others.append(Way(geometry, (1, node_size, node_size, 1)))
    return *others, last
