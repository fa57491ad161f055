"""One rank's part of an exchange: the rows that each hop moves, and how they are copied and summed.

`planner/native/hops.cpp` finds the rows. Triton kernels move them on CUDA, and torch elsewhere,
whose code is the reference for `kernels.py`. All matrices of an expert are in rows of K elements: a
row of a matrix is one or several of these.

Legend: K columns. Z segments of rows, T sums of such, P ranks of a hop's link.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.device import kernels_of
from megatron_laer.planner.hops import Way
from megatron_laer.planner.native_core import native
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.copies import upload, upload_arrays

# Tensors [rows, K] of a holding.
Held = Sequence[torch.Tensor]
# Matrices of an expert, each with its rows, and the rows of K elements that each of them is.
Matrices = tuple[tuple[int, int], ...]
# Rows to read and those to write, which are slices where they are neighbours.
_Rows = tuple[slice | torch.Tensor, slice | torch.Tensor]


def exchange_kernels(device: torch.device) -> Any:
    return kernels_of("megatron_laer.runtime.comm", device)


class Segments(NamedTuple):
    """Rows that are both in a holding and on the wire, as a part of a table.

    The table has four numbers for each segment: its tensor of the holding, its first row there, its
    first row on the wire, and its rows, at least one. They are in ascending order. Segments of the
    same rows of a tensor are parts of a sum, in the order of addition. Behind them are the first
    segment of each sum, and the number of segments.

    Attributes:
        at: begin of the part; `number` of segments, and of their `sums`.
        rows: of all segments; `most_rows` of one.
        in_place: first row of the holding, if all lie there in one piece as on the wire.
    """

    at: int
    number: int
    sums: int
    rows: int
    most_rows: int
    in_place: int | None

    def view(self, held: Held) -> torch.Tensor:
        """Return the rows of the holding as they are on the wire, which is possible in place."""
        assert self.in_place is not None
        return held[0][self.in_place : self.in_place + self.rows]


class Move(NamedTuple):
    """Rows of experts that a rank sends and receives in one hop, there or back.

    Attributes:
        link: of `hops.Link`.
        holding: number behind the owners of the holding that a restore's move fills, and that a
            reduce's move leaves.
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
    holding: int
    is_kept: bool
    is_first: bool
    is_last: bool
    sent_P: list[int]
    received_P: list[int]
    leaves: Segments
    arrives: Segments

    @property
    def leaves_in_place(self) -> bool:
        """Whether there are rows to send, and they lie as on the wire."""
        return self.leaves.in_place is not None and self.leaves.rows > 0

    @property
    def packs(self) -> bool:
        """Whether a restore copies its rows to send them: a holding's make room for the next."""
        return not (self.leaves_in_place and (self.is_first or self.is_kept))

    def back(self) -> Move:
        ends = self.is_last, self.is_first
        sizes = self.received_P, self.sent_P
        return Move(self.link, self.holding, False, *ends, *sizes, self.arrives, self.leaves)


class Table:
    """Segments of one rank, and their copies and sums.

    Kernels read it from the device, where it is uploaded on the current stream. So that must be the
    stream of its copies and sums.
    """

    def __init__(self, table: Int64, device: torch.device) -> None:
        self._numbers = table
        self._device = device
        self._kernels = exchange_kernels(device)
        self._rows: dict[tuple[int, bool], list[_Rows]] = {}
        self._sums: dict[int, tuple[list[_Rows], list[_Rows]]] = {}
        self._places: list[int] = []

    def place(self, owned: Held) -> None:
        """Note where the owned tensors lie, which kernels find by their distances to the first."""
        if self._kernels is None:
            return
        begins = [tensor.data_ptr() for tensor in owned] or [0]
        places = [(begin - begins[0]) // owned[0].element_size() for begin in begins[1:]]
        if [0, *places] != self._places:
            self._places = [0, *places]
            numbers = self._numbers, np.array(self._places)
            self._uploaded = upload(torch.from_numpy(np.concatenate(numbers)), self._device)

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
        if not segments.number:
            return
        if self._kernels is not None:
            self._kernels.sum_segments(held, wire, self._on_device, segments, adds=adds)
            return
        if segments.at not in self._sums:
            self._sums[segments.at] = self._rows_of_sums(segments, len(held))
        ((first, _), *others), results = self._sums[segments.at]
        total = wire[first].to(torch.float32, copy=True)
        for read, written in others:
            _write(total, written, wire[read], adds=True)
        for tensor, (read, written) in zip(held, results, strict=True):
            _write(tensor, written, total[read], adds=adds)

    def _copy(self, segments: Segments, held: Held, wire: torch.Tensor, *, packs: bool) -> None:
        if not segments.number:
            return
        if self._kernels is not None:
            self._kernels.copy_segments(held, wire, self._on_device, segments, packs=packs)
            return
        key = segments.at, packs
        if key not in self._rows:
            tensor_Z, held_Z, wire_Z, size_Z = self._of(segments).T
            from_Z, to_Z = (held_Z, wire_Z) if packs else (wire_Z, held_Z)
            of_tensors = [tensor_Z == at for at in range(len(held))]
            self._rows[key] = [
                _rows(from_Z[of], to_Z[of], size_Z[of], self._device) for of in of_tensors
            ]
        for tensor, (read, written) in zip(held, self._rows[key], strict=True):
            source, target = (tensor, wire) if packs else (wire, tensor)
            if not isinstance(written, slice):
                target.index_copy_(0, written, source[read])
            elif not isinstance(read, slice):
                torch.index_select(source, 0, read, out=target[written])
            else:
                target[written].copy_(source[read])

    def _rows_of_sums(self, segments: Segments, tensors: int) -> tuple[list[_Rows], list[_Rows]]:
        """Return the rows of the first parts of all sums, of the second, …, and of the results.

        Parts are added from the wire to a tensor of all sums. Its rows go to each tensor.
        """
        begin = segments.at + 4 * segments.number
        firsts_T1 = self._numbers[begin : begin + segments.sums + 1]
        rows_Z4, first_T, parts_T = self._of(segments), firsts_T1[:-1], np.diff(firsts_T1)
        tensor_T, held_T, _, size_T = rows_Z4[first_T].T
        begin_T, device = np.cumsum(size_T) - size_T, self._device
        parts, results = [], []
        for part in range(parts_T.max()):
            has = parts_T > part
            wire_T = rows_Z4[first_T[has] + part, 2]
            parts.append(_rows(wire_T, begin_T[has], size_T[has], device))
        for at in range(tensors):
            of = tensor_T == at
            results.append(_rows(begin_T[of], held_T[of], size_T[of], device))
        return parts, results

    def _of(self, segments: Segments) -> Int64:
        return self._numbers[segments.at :][: 4 * segments.number].reshape(-1, 4)

    @property
    def _on_device(self) -> tuple[torch.Tensor, int]:
        """Return the table on the device, and where the places of owned tensors begin in it."""
        return self._uploaded, len(self._numbers)


class Chain:
    """One rank's moves of experts, from the owners to the slots or back.

    Attributes:
        owned: numbers of the owned tensors of which it moves rows, in the order of segments.
        held_rows: of each holding between owners and slots, after all moves into it.

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
        parts = native.rank_moves(way.native, slots_S, before_S, rank, matrices)
        table, self.owned, self.held_rows, found = parts
        moves = [
            Move._make((*others, Segments._make(leaves), Segments._make(arrives)))
            for *others, leaves, arrives in found
        ]
        self.way = way
        self.moves = [move.back() for move in reversed(moves)] if back else moves
        self.table = Table(table, device)

    def restore_bytes(self, row_bytes: int) -> dict[str, int]:
        """Return the bytes of each buffer that this restore needs."""
        sent = [move.leaves.rows for move in self.moves if move.packs]
        received = [move.arrives.rows for move in self.moves if move.arrives.in_place is None]
        return {
            "send": max(sent, default=0) * row_bytes,
            "receive": max([*received, *self.held_rows], default=0) * row_bytes,
        }

    def reduce_bytes(self, grad_bytes: int, wire_bytes: int) -> dict[str, int]:
        """Return the bytes of each buffer that this reduce needs."""
        each = [grad_bytes if move.is_first else wire_bytes for move in self.moves]
        pairs = [*zip(self.moves, each, strict=True)]
        sent = [move.leaves.rows * of for move, of in pairs if not move.leaves_in_place]
        received = [move.arrives.rows * of for move, of in pairs]
        return {
            "send": max([*sent, *(rows * wire_bytes for rows in self.held_rows)], default=0),
            "receive": max(received, default=0),
        }


def _rows(from_Z: Int64, to_Z: Int64, size_Z: Int64, device: torch.device) -> _Rows:
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
    return found[0], found[1]


def _write(
    target: torch.Tensor, rows: slice | torch.Tensor, source: torch.Tensor, *, adds: bool
) -> None:
    """Copy to rows of the target, or add to them in the wider dtype of both."""
    if isinstance(rows, slice):
        target[rows].add_(source) if adds else target[rows].copy_(source)
    else:
        written = target[rows] + source if adds else source
        target.index_copy_(0, rows, written.to(target.dtype))
