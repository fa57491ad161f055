"""One rank's part of an exchange: the rows that each hop moves, and how they are copied and summed.

`planner/native/hops.cpp` finds the rows. Triton kernels move them on CUDA, and torch elsewhere,
whose code is the reference for `kernels.py`. All matrices of an expert are in rows of K elements: a
row of a matrix is one or several of these.

Legend: K columns. Z segments of rows, T sums of such, P ranks of a hop's link.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.hops import Way
from megatron_laer.planner.native_core import native
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.copies import upload_arrays

# Tensors [rows, K] of a holding.
Held = Sequence[torch.Tensor]
# Matrices of an expert, each with its rows, and the rows of K elements that each of them is.
Matrices = tuple[tuple[int, int], ...]


@cache
def kernels_of(package: str, device: torch.device) -> Any:
    """Return the package's module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"{package}.kernels")


def exchange_kernels(device: torch.device) -> Any:
    return kernels_of("megatron_laer.runtime.comm", device)


class Part(NamedTuple):
    """Segments in one tensor of a holding, and their sums."""

    tensor: int
    first: int
    segments: int
    first_sum: int
    sums: int


class Segments(NamedTuple):
    """Rows that are both in a holding and on the wire, as a part of a table.

    The table has three numbers for each segment: its first row in its tensor, in ascending order,
    its first row on the wire, and its rows, at least one. Segments of the same rows of a tensor are
    parts of a sum, in the order of addition. Behind them are the first segment of each sum, and the
    number of segments.

    Attributes:
        at: begin of the part; `number` of segments.
        rows: of all segments; `most_rows` of one.
        end: the row of the last tensor behind its last segment.
        in_place: tensor and row of the holding where all rows, some at least, lie in one piece as
            on the wire.
    """

    at: int
    number: int
    rows: int
    most_rows: int
    end: int
    in_place: tuple[int, int] | None
    parts: Sequence[Part]

    def view(self, held: Held) -> torch.Tensor:
        """Return the rows of the holding as they are on the wire, which is possible in place."""
        assert self.in_place is not None
        tensor, first = self.in_place
        return held[tensor][first : first + self.rows]


class Move(NamedTuple):
    """Rows of experts that a rank sends and receives in one hop, there or back.

    Attributes:
        link: of `hops.Link`.
        is_kept: whether the slots as they were before have the rows.
        is_first: whether the owners or, in a reduce, the slots have them.
        is_last: whether they go to the slots or, in a reduce, to the owners.
        sent_P: rows to each rank of the link.
        received_P: rows from each.
        leaves: rows that are sent, in the holding that has them.
        arrives: rows that are received, in the holding that they go to. Where the link has one
            rank, nothing is sent, and the wire of each is the other's holding.
    """

    link: int
    is_kept: bool
    is_first: bool
    is_last: bool
    sent_P: list[int]
    received_P: list[int]
    leaves: Segments
    arrives: Segments

    def back(self) -> Move:
        sizes = self.received_P, self.sent_P
        return Move(
            self.link, False, self.is_last, self.is_first, *sizes, self.arrives, self.leaves
        )


class Table:
    """Segments of one rank, and their copies and sums.

    Kernels read it from the device, where it is uploaded on the current stream. So that must be the
    stream of its copies and sums.
    """

    def __init__(self, table: Int64, device: torch.device) -> None:
        self._numbers = table
        self._kernels = exchange_kernels(device)
        self._rows: dict[tuple[int, int, bool], list[slice | torch.Tensor]] = {}
        self._sums: dict[tuple[int, int], list[list[list[int]]]] = {}
        if self._kernels is not None:
            (self._uploaded,) = upload_arrays([table], device)

    def pack(self, segments: Segments, held: Held, wire: torch.Tensor) -> None:
        """Copy rows from the holding to the wire."""
        self._copy(segments, held, wire, packs=True)

    def unpack(self, segments: Segments, wire: torch.Tensor, held: Held) -> None:
        """Copy rows from the wire to the holding."""
        self._copy(segments, held, wire, packs=False)

    def add(self, segments: Segments, wire: torch.Tensor, held: Held, *, adds: bool) -> None:
        """Sum rows on the wire in float32 and in order, and round once, to the holding.

        Each sum has one writer, so sums need no atomics and have the same bits every time.

        Args:
            adds: whether to add the sums to the holding's rows.
        """
        for part in segments.parts:
            tensor = held[part.tensor]
            if self._kernels is not None:
                self._kernels.sum_segments(wire, self._uploaded, tensor, segments, part, adds=adds)
                continue
            key = segments.at, part.tensor
            if key not in self._sums:
                rows_Z = self._of(segments).tolist()
                begin = segments.at + 3 * segments.number + part.first_sum
                firsts_T1 = self._numbers[begin : begin + part.sums + 1].tolist()
                self._sums[key] = [rows_Z[slice(*ends)] for ends in pairwise(firsts_T1)]
            for rows_Z in self._sums[key]:
                to, _, size = rows_Z[0]
                summed = [wire[row : row + size] for _, row, _ in rows_Z]
                total = sum(summed[1:], start=summed[0].float())
                target = tensor[to : to + size]
                target.add_(total) if adds else target.copy_(total)

    def _copy(self, segments: Segments, held: Held, wire: torch.Tensor, *, packs: bool) -> None:
        for part in segments.parts:
            tensor = held[part.tensor]
            if self._kernels is not None:
                self._kernels.copy_segments(
                    tensor, wire, self._uploaded, segments, part, packs=packs
                )
                continue
            key = segments.at, part.tensor, packs
            if key not in self._rows:
                held_Z, wire_Z, size_Z = self._of(segments)[part.first :][: part.segments].T
                ends_Z = (held_Z, wire_Z) if packs else (wire_Z, held_Z)
                self._rows[key] = _rows(*ends_Z, size_Z, wire.device)
            source, target = (tensor, wire) if packs else (wire, tensor)
            read, written = self._rows[key]
            if isinstance(written, torch.Tensor):
                target.index_copy_(0, written, source[read])
            elif isinstance(read, torch.Tensor):
                torch.index_select(source, 0, read, out=target[written])
            else:
                target[written].copy_(source[read])

    def _of(self, segments: Segments) -> Int64:
        return self._numbers[segments.at :][: 3 * segments.number].reshape(-1, 3)


class Chain:
    """One rank's moves of experts, from the owners to the slots or back.

    Args:
        before: the layout whose experts the slots have when a restore begins; None for no experts.
    """

    def __init__(
        self,
        way: Way,
        placed: Placed,
        before: Placed | None,
        rank: int,
        matrices: Matrices,
        device: torch.device,
        *,
        back: bool = False,
    ) -> None:
        before_S = None if before is None else before.layout.slot_expert_S
        slots_S = placed.layout.slot_expert_S
        table, found = native.rank_moves(way.native, slots_S, before_S, rank, matrices)
        moves = [
            Move._make((*others, _segments(leaves), _segments(arrives)))
            for *others, leaves, arrives in found
        ]
        self.way = way
        self.moves = [move.back() for move in reversed(moves)] if back else moves
        self.table = Table(table, device)


def _segments(found: tuple[Any, ...]) -> Segments:
    *others, parts = found
    return Segments._make((*others, [Part._make(part) for part in parts]))


def _rows(
    from_Z: Int64, to_Z: Int64, size_Z: Int64, device: torch.device
) -> list[slice | torch.Tensor]:
    """Return the rows to read and those to write, which are slices where they are neighbours."""
    order_Z = np.argsort(to_Z)
    size_Z = size_Z[order_Z]
    before_Z = np.cumsum(size_Z) - size_Z
    found: list[slice | torch.Tensor] = []
    for first_Z in (from_Z[order_Z], to_Z[order_Z]):
        shift_Z = first_Z - before_Z
        if (shift_Z == shift_Z[0]).all():
            found.append(slice(int(first_Z[0]), int(first_Z[0] + size_Z.sum())))
        else:
            rows = np.repeat(shift_Z, size_Z) + np.arange(size_Z.sum())
            found += upload_arrays([rows], device)
    return found
