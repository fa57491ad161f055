"""One rank's part of an exchange: the rows that each hop moves, and how they are copied and summed.

`planner/native/hops.cpp` finds the rows. Triton kernels move them on CUDA, and torch elsewhere,
whose code is the reference for `kernels.py`.

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

# Tensors [rows, K] of a holding; their rows count on from one to the next.
Held = Sequence[torch.Tensor]


@cache
def kernels_of(package: str, device: torch.device) -> Any:
    """Return the package's module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"{package}.kernels")


def exchange_kernels(device: torch.device) -> Any:
    return kernels_of("megatron_laer.runtime.comm", device)


class Part(NamedTuple):
    """Segments in one tensor of a holding, whose first row is `base`, and their sums."""

    tensor: int
    base: int
    first: int
    segments: int
    first_sum: int
    sums: int


class Segments(NamedTuple):
    """Rows that are both in a holding and on the wire, as a part of a table.

    The table has three numbers for each segment: its first row in the holding, in ascending order,
    its first row on the wire, and its rows, at least one. Segments of the same rows in the holding
    are parts of a sum, in the order of addition. Behind them are the first segment of each sum, and
    the number of segments.

    Attributes:
        at: begin of the part; `number` of segments.
        rows: of all segments; `most_rows` of one.
        end: the row of the holding behind its last segment.
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
    """Rows of one matrix that a rank sends and receives in one hop, there or back.

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
        self._runs: dict[tuple[int, int, bool], list[_Run]] = {}
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
            rows_Z = self._of(segments).tolist()
            begin = segments.at + 3 * segments.number + part.first_sum
            for first, last in pairwise(self._numbers[begin : begin + part.sums + 1].tolist()):
                to, _, size = rows_Z[first]
                summed = [wire[row : row + size] for _, row, _ in rows_Z[first:last]]
                total = sum(summed[1:], start=summed[0].float())
                target = tensor[to - part.base : to - part.base + size]
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
            if key not in self._runs:
                held_Z, wire_Z, size_Z = self._of(segments)[part.first :][: part.segments].T
                ends = (held_Z - part.base, wire_Z) if packs else (wire_Z, held_Z - part.base)
                self._runs[key] = _runs(*ends, size_Z, wire.device)
            source, target = (tensor, wire) if packs else (wire, tensor)
            for to, size, rows in self._runs[key]:
                into = target[to : to + size]
                if isinstance(rows, int):
                    into.copy_(source[rows : rows + size])
                else:
                    torch.index_select(source, 0, rows, out=into)

    def _of(self, segments: Segments) -> Int64:
        return self._numbers[segments.at :][: 3 * segments.number].reshape(-1, 3)


class Chain:
    """One rank's moves of matrices with R rows, from the owners to the slots or back.

    Args:
        before: the layout whose experts the slots have when a restore begins; None for no experts.
    """

    def __init__(
        self,
        way: Way,
        placed: Placed,
        before: Placed | None,
        rank: int,
        rows: int,
        device: torch.device,
        *,
        back: bool = False,
    ) -> None:
        before_S = None if before is None else before.layout.slot_expert_S
        slots_S = placed.layout.slot_expert_S
        table, found = native.rank_moves(way.native, slots_S, before_S, rank, rows)
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


# Neighbouring rows to write: the first, their number, and the first row to read, or each of them.
_Run = tuple[int, int, int | torch.Tensor]


def _runs(from_Z: Int64, to_Z: Int64, size_Z: Int64, device: torch.device) -> list[_Run]:
    order_Z = np.argsort(to_Z)
    from_Z, to_Z, size_Z = from_Z[order_Z], to_Z[order_Z], size_Z[order_Z]
    begins = np.flatnonzero(to_Z[1:] != (to_Z + size_Z)[:-1]) + 1
    found: list[_Run] = []
    for first, last in pairwise([0, *begins.tolist(), to_Z.size]):
        rows: int | torch.Tensor = int(from_Z[first])
        sizes = size_Z[first:last]
        if last > first + 1:
            shift = from_Z[first:last] - (np.cumsum(sizes) - sizes)
            if (shift != rows).any():
                gathered = np.repeat(shift, sizes) + np.arange(sizes.sum())
                (rows,) = upload_arrays([gathered], device)
        found.append((int(to_Z[first]), int(sizes.sum()), rows))
    return found
