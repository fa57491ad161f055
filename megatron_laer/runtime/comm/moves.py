"""One rank's part of an exchange, hop by hop, and the rows of a matrix that each hop moves.

Rows lie in a holding on both sides. Where a holding between owners and slots is the target, its
rows lie as they arrive.

Legend: N ranks, C replica slots per rank, h home experts of a rank; R rows of a matrix. Z row
blocks that this rank sends or receives in a hop, P ranks of its link.
"""

from __future__ import annotations

from dataclasses import dataclass
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
            rank, nothing is sent, and the wire of these is the holding that has them.
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
        self._restores: dict[int, list[Move]] = {}
        self._reduces: dict[int, list[Move]] = {}

    def restores(self, rows: int) -> list[Move]:
        """Return the moves that fill slots with matrices of R rows.

        Tables are uploaded on the current stream, which must be that of all restores.
        """
        if rows not in self._restores:
            moves = [self._move(*hop_rows) for hop_rows in self._rows(rows)]
            self._upload(moves)
            self._restores[rows] = moves
        return self._restores[rows]

    def reduces(self, rows: int) -> list[Move]:
        """Return the moves that sum gradients; tables are uploaded as those of restores."""
        if rows not in self._reduces:
            moves = [self._move_back(*hop_rows) for hop_rows in reversed(self._rows(rows))]
            self._upload(moves)
            self._reduces[rows] = moves
        return self._reduces[rows]

    def _upload(self, moves: list[Move]) -> None:
        parts = [part for move in moves for part in (move.leaves, move.arrives)]
        upload_tables(parts)

    def _move(self, hop: RankHop, taken: _Rows, put: _Rows) -> Move:
        size = hop.link.size(self.way.geometry)
        return Move(
            hop.link,
            leaves=taken.segments(),
            arrives=put.segments() if size > 1 else put.segments(taken.row_Z),
            sent_P=taken.by_peer(hop.sent, size),
            received_P=put.by_peer(hop.received, size),
            is_kept=hop.is_kept,
            is_first=taken.is_end,
            is_last=put.is_end,
        )

    def _move_back(self, hop: RankHop, taken: _Rows, put: _Rows) -> Move:
        size = hop.link.size(self.way.geometry)
        return Move(
            hop.link,
            leaves=put.segments(),
            arrives=taken.segments() if size > 1 else taken.segments(put.row_Z),
            sent_P=put.by_peer(hop.received, size),
            received_P=taken.by_peer(hop.sent, size),
            is_kept=False,
            is_first=put.is_end,
            is_last=taken.is_end,
        )

    def _rows(self, rows: int) -> list[tuple[RankHop, _Rows, _Rows]]:
        """Return, of each hop that moves, the rows that it takes and those where it puts them."""
        geometry, at_home = self.way.geometry, self.way.at_home
        bounds = np.array(row_bounds(rows, self.way.blocks))
        rows_B = np.diff(bounds)
        slot_row_Z, own_row_Z = (
            np.add.outer(np.arange(matrices) * rows, bounds[:-1]).ravel()
            for matrices in (geometry.replica_slots, geometry.home_slots)
        )
        if not at_home:
            own_row_Z = np.arange(geometry.num_experts) * rows_B[self._rank]
        held_row_Z, arrived, end = own_row_Z, [], 0
        found: list[tuple[RankHop, _Rows, _Rows]] = []
        for hop, following in zip(self._hops, [*self._hops[1:], None], strict=True):
            row_Z = (slot_row_Z if hop.is_kept else held_row_Z)[hop.sent.piece_Z]
            is_first = held_row_Z is own_row_Z
            tensor_rows = rows if at_home and is_first and not hop.is_kept else _ALL_ROWS
            taken = _Rows(row_Z, rows_B[hop.sent.block_Z], tensor_rows, is_first, self._device)
            size_Z = rows_B[hop.received.block_Z]
            if following is None:
                row_Z = slot_row_Z[hop.received.piece_Z]
            else:
                row_Z = end + _before(size_Z)
                end += int(size_Z.sum())
                arrived.append((hop.received.piece_Z, row_Z))
            put = _Rows(row_Z, size_Z, _ALL_ROWS, following is None, self._device)
            if following is not None and not following.is_kept:
                pieces_Z, rows_Z = map(np.concatenate, zip(*arrived, strict=True))
                held_row_Z = np.empty_like(rows_Z)
                held_row_Z[pieces_Z] = rows_Z
                arrived, end = [], 0
            if hop.moves:
                found.append((hop, taken, put))
        return found


class _Rows(NamedTuple):
    """Rows of one holding, in the order of the wire; `is_end` of the owners and of the slots."""

    row_Z: Int64
    size_Z: Int64
    tensor_rows: int
    is_end: bool
    device: torch.device

    def segments(self, wire_Z: Int64 | None = None) -> Segments:
        wire_Z = _before(self.size_Z) if wire_Z is None else wire_Z
        return Segments.of(self.row_Z, wire_Z, self.size_Z, self.tensor_rows, self.device)

    def by_peer(self, end: End, peers: int) -> list[int]:
        return np.bincount(end.peer_Z, self.size_Z, peers).astype(np.int64).tolist()


def _before(size_Z: Int64) -> Int64:
    """Return the sum of the sizes before each."""
    return np.cumsum(size_Z) - size_Z
