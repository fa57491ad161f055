"""Hops of exchanges in NumPy, as joins of neighbouring holdings: `native/hops.cpp` finds the same.

Legend: N ranks, E experts, C replica slots per rank, S = N·C slots. X experts that a hop moves,
each to one place. Z row blocks that one rank sends or receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.hops import Link, Way
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.placed import Placed


class Places(NamedTuple):
    """Experts in one holding: the place of each, and its position among those of the place."""

    width: int
    place_X: Int64
    at_X: Int64

    def of(self, entries_X: Int64) -> Places:
        return Places(self.width, self.place_X[entries_X], self.at_X[entries_X])


@dataclass(frozen=True, eq=False)
class Hop:
    """Experts that places of one holding send to places of the next, in order of the latter.

    Attributes:
        source: the place that has each expert, and where.
        target: the place that wants it, and where.
        is_kept: whether the source is the slots as they were before.
    """

    link: Link
    source: Places
    target: Places
    is_kept: bool = False


def hops(
    placed: Placed, way: Way, before: Placed | None = None, changed_S: Bool | None = None
) -> tuple[Hop, ...]:
    """Return the hops of a restore, from the owners on.

    A hop from the slots before follows the hop to the same nodes.

    Args:
        before: the layout whose experts the slots have, so that only others are fetched.
        changed_S: instead, the slots to fetch where no experts are kept.
    """
    assert changed_S is None or before is None, "changed_S follows from the layout before"
    geometry, filled_S = way.geometry, placed.changed_S(before)
    if changed_S is None:
        changed_S = filled_S
    elif changed_S.shape != filled_S.shape:
        raise ValueError(f"changed_S has shape {changed_S.shape}, expected {filled_S.shape}")
    slots_X = np.flatnonzero(changed_S & filled_S)
    expert_X = placed.replica_expert_S[slots_X].astype(np.int64)
    wanted = Places(1, *np.divmod(slots_X, geometry.replica_slots))
    found: list[Hop] = []
    links = way.links
    for width, link in zip(reversed(way.widths[1:-1]), reversed(links[1:]), strict=True):
        pair_X = wanted.place_X * wanted.width // width * geometry.num_experts + expert_X
        pair_Y, of_X = np.unique(pair_X, return_inverse=True)
        place_Y, expert_X = np.divmod(pair_Y, geometry.num_experts)
        at_Y = np.arange(len(place_Y)) - np.searchsorted(place_Y, place_Y)
        between = Places(width, place_Y, at_Y)
        found.append(Hop(link, between.of(of_X), wanted))
        wanted = between
        if before is not None and width < geometry.num_ranks:
            slot_Y = _kept_slots(before, width, pair_Y)
            kept_Y, new_Y = np.flatnonzero(slot_Y != EMPTY), np.flatnonzero(slot_Y == EMPTY)
            source = Places(1, *np.divmod(slot_Y[kept_Y], geometry.replica_slots))
            found.append(Hop(Link.INSIDE, source, wanted.of(kept_Y), is_kept=True))
            wanted, expert_X = wanted.of(new_Y), expert_X[new_Y]
    if way.at_home:
        owners = Places(1, *np.divmod(expert_X, geometry.home_slots))
    else:
        owners = Places(geometry.num_ranks, np.zeros_like(expert_X), expert_X)
    found.append(Hop(links[0], owners, wanted))
    return tuple(reversed(found))


def _kept_slots(before: Placed, node_size: int, pair_Y: Int64) -> Int64:
    """Return a slot of the layout before for each pair node·E + expert; `EMPTY` without one."""
    geometry = before.geometry
    node_S = np.arange(before.filled_S.size) // (node_size * geometry.replica_slots)
    pair_S = node_S * geometry.num_experts + before.replica_expert_S
    pair_S = np.where(before.filled_S, pair_S, EMPTY)
    by_pair = np.argsort(pair_S, kind="stable")
    first_Y = np.searchsorted(pair_S[by_pair], pair_Y)
    count_Y = np.searchsorted(pair_S[by_pair], pair_Y, side="right") - first_Y
    # Not always the first of an expert's slots, or the first rank of a node would hand out most.
    turn_Y = pair_Y % geometry.num_experts % np.maximum(count_Y, 1)
    slot_Y = by_pair[np.minimum(first_Y + turn_Y, by_pair.size - 1)]
    return np.where(count_Y > 0, slot_Y, EMPTY)


class End(NamedTuple):
    """Row blocks that one rank sends or receives in a hop: peer by peer, in order of the hop.

    Attributes:
        peer_Z: positions in the hop's link.
        piece_Z: positions among the rank's blocks in the holding.
        block_Z: numbers of the blocks.
    """

    peer_Z: Int64
    piece_Z: Int64
    block_Z: Int64


class RankHop(NamedTuple):
    """One rank's part of a hop.

    Attributes:
        source_width: of the holding that the hop takes from.
        moves: whether any rank of the link sends or receives.
    """

    link: Link
    source_width: int
    is_kept: bool
    moves: bool
    sent: End
    received: End


def rank_hops(hops: Sequence[Hop], way: Way, rank: int) -> tuple[RankHop, ...]:
    """Return one rank's parts of the hops; both of its ends have the order of the other rank's."""
    node_size, blocks = way.geometry.node_size, 1 if way.is_direct else way.geometry.num_ranks
    found = []
    for hop in hops:
        moves = len(hop.target.place_X) > 0
        if hop.link is Link.INSIDE:
            nodes_X = hop.target.place_X * hop.target.width // node_size
            moves = bool((nodes_X == rank // node_size).any())
        sent = _end(hop.source, hop.target, hop.link, node_size, blocks, rank)
        received = _end(hop.target, hop.source, hop.link, node_size, blocks, rank)
        found.append(RankHop(hop.link, hop.source.width, hop.is_kept, moves, sent, received))
    return tuple(found)


def _end(mine: Places, other: Places, link: Link, node_size: int, blocks: int, rank: int) -> End:
    entries_X = np.flatnonzero(mine.place_X == rank // mine.width)
    block_B = np.arange(rank % mine.width, blocks, mine.width)
    first_X = other.place_X[entries_X] * other.width
    peer_XB = first_X[:, None] + block_B % other.width
    piece_XB = mine.at_X[entries_X][:, None] * len(block_B) + np.arange(len(block_B))
    peers = peer_XB.ravel()
    order_Z = np.argsort(peers, kind="stable")
    peer_Z = peers[order_Z]
    if link is Link.BETWEEN:
        peer_Z //= node_size
    elif link is Link.INSIDE:
        peer_Z %= node_size
    return End(peer_Z, piece_XB.ravel()[order_Z], np.tile(block_B, len(entries_X))[order_Z])
