"""One rank's part of an exchange, hop by hop, and the rows of a matrix that each hop moves.

Rows lie in a holding on both sides. Where a holding between owners and slots is the target, its
rows lie as they arrive.

Legend: N ranks, C replica slots per rank, h home experts of a rank; R rows of a matrix. Z row
blocks that this rank sends or receives in a hop, P ranks of its link.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.hops import End, Link, RankHop, Way, hops, rank_hops
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.runtime.comm.segments import Segments, upload_tables

# As many rows as no tensor has: a holding of one tensor.
_ALL_ROWS = 1 << 48


@dataclass(frozen=True)
class Move:
    """Rows of one matrix that this rank sends and receives in one hop, there or back.

    Attributes:
        leaves: rows that are sent, in the holding that has them.
        arrives: rows that are received, in the holding that they go to. Where the link has one
            rank, nothing is sent, and the wire of each is the other's holding.
        sent_P: rows to each rank of the link.
        received_P: rows from each.
        is_kept: whether the slots as they were before have the rows.
        is_first: whether the owners or, in a reduce, the slots have them.
        is_last: whether they go to the slots or, in a reduce, to the owners.
    """

    link: Link
    leaves: Segments
    arrives: Segments
    sent_P: list[int]
    received_P: list[int]
    is_kept: bool
    is_first: bool
    is_last: bool

    def back(self) -> Move:
        """Return the same rows on their way back, which is on another stream."""
        leaves, arrives = copy(self.arrives), copy(self.leaves)
        ends = self.received_P, self.sent_P, False, self.is_last, self.is_first
        return Move(self.link, leaves, arrives, *ends)


class Chain:
    """One rank's part of the exchanges of a layout.

    Args:
        before: the layout whose experts the slots have when a restore begins; None for no experts.
    """

    def __init__(
        self, way: Way, placed: Placed, before: Placed | None, rank: int, device: torch.device
    ) -> None:
        self.way = way
        self._rank, self._device = rank, device
        self._hops = rank_hops(hops(placed, way, before), way, rank)
        self._there: dict[int, list[Move]] = {}
        self._placed: dict[tuple[int, bool], list[Move]] = {}

    def restores(self, rows: int) -> list[Move]:
        """Return the moves that fill slots with matrices of R rows.

        Tables are uploaded on the current stream, which must be that of all restores.
        """
        if (rows, True) not in self._placed:
            self._placed[rows, True] = _uploaded(self._moves(rows))
        return self._placed[rows, True]

    def reduces(self, rows: int) -> list[Move]:
        """Return the moves that sum gradients; tables are uploaded as those of restores."""
        if (rows, False) not in self._placed:
            moves = [move.back() for move in reversed(self._moves(rows))]
            self._placed[rows, False] = _uploaded(moves)
        return self._placed[rows, False]

    def _moves(self, rows: int) -> list[Move]:
        """Return the moves of a restore, in which every hop has the rows of its two ends."""
        if rows in self._there:
            return self._there[rows]
        geometry, at_home, blocks = self.way.geometry, self.way.at_home, self.way.blocks
        rows_B, slot_row_Z = _whole(geometry.replica_slots, rows, blocks)
        if at_home:
            own_row_Z = _whole(geometry.home_slots, rows, blocks)[1]
        else:
            own_row_Z = np.arange(geometry.num_experts) * rows_B[self._rank]
        held_row_Z, arrived, end = own_row_Z, [], 0
        found: list[Move] = []
        for hop, following in zip(self._hops, [*self._hops[1:], None], strict=True):
            row_Z = (slot_row_Z if hop.is_kept else held_row_Z)[hop.sent.piece_Z]
            is_first = held_row_Z is own_row_Z
            tensor_rows = rows if at_home and is_first and not hop.is_kept else _ALL_ROWS
            taken = _Rows(row_Z, rows_B[hop.sent.block_Z], tensor_rows, is_first)
            size_Z = rows_B[hop.received.block_Z]
            if following is None:
                row_Z = slot_row_Z[hop.received.piece_Z]
            else:
                row_Z = end + _before(size_Z)
                end += int(size_Z.sum())
                arrived.append((hop.received.piece_Z, row_Z))
            put = _Rows(row_Z, size_Z, _ALL_ROWS, following is None)
            if following is not None and not following.is_kept:
                pieces_Z, rows_Z = map(np.concatenate, zip(*arrived, strict=True))
                held_row_Z = np.empty_like(rows_Z)
                held_row_Z[pieces_Z] = rows_Z
                arrived, end = [], 0
            if hop.moves:
                found.append(self._move(hop, taken, put))
        self._there[rows] = found
        return found

    def _move(self, hop: RankHop, taken: _Rows, put: _Rows) -> Move:
        peers = hop.link.size(self.way.geometry)
        on_wire = peers > 1
        return Move(
            hop.link,
            taken.segments(_before(taken.size_Z) if on_wire else put.row_Z, self._device),
            put.segments(_before(put.size_Z) if on_wire else taken.row_Z, self._device),
            taken.by_peer(hop.sent, peers),
            put.by_peer(hop.received, peers),
            hop.is_kept,
            is_first=taken.is_end,
            is_last=put.is_end,
        )


class _Rows(NamedTuple):
    """Rows of one holding, in the order of the wire; `is_end` of the owners and of the slots."""

    row_Z: Int64
    size_Z: Int64
    tensor_rows: int
    is_end: bool

    def segments(self, wire_Z: Int64, device: torch.device) -> Segments:
        return Segments.of(self.row_Z, wire_Z, self.size_Z, self.tensor_rows, device)

    def by_peer(self, end: End, peers: int) -> list[int]:
        return np.bincount(end.peer_Z, self.size_Z, peers).astype(np.int64).tolist()


@lru_cache(maxsize=256)
def _whole(matrices: int, rows: int, blocks: int) -> tuple[Int64, Int64]:
    """Return the rows of each block, and the first row of each block of whole matrices."""
    bounds = np.array(row_bounds(rows, blocks))
    first_Z = np.add.outer(np.arange(matrices) * rows, bounds[:-1]).ravel()
    return np.diff(bounds), first_Z


def _uploaded(moves: list[Move]) -> list[Move]:
    upload_tables([part for move in moves for part in (move.leaves, move.arrives)])
    return moves


def _before(size_Z: Int64) -> Int64:
    """Return the sum of the sizes before each."""
    return np.cumsum(size_Z) - size_Z
