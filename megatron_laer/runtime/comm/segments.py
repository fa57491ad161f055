"""Copies and sums of rows between a holding and the wire: Triton kernels on CUDA, torch elsewhere.

The torch code is the reference for `kernels.py`.

Legend: K columns. Z segments of rows, T sums of such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_laer.arrays import Int64
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


class Table(NamedTuple):
    """Segments on the device, in ascending order of `held_Z`.

    Attributes:
        first_T1: the segments of sum t begin at `first_T1[t]`, and end where the next begin.
    """

    held_Z: torch.Tensor
    wire_Z: torch.Tensor
    size_Z: torch.Tensor
    first_T1: torch.Tensor


@dataclass(eq=False)
class Segments:
    """Rows that are both in a holding and on the wire, in ascending order of the former.

    Segments of the same rows in the holding are parts of a sum, in the order of addition. Each sum
    has one writer, so sums need no atomics and have the same bits every time.

    Attributes:
        held_Z: the first row of each segment in the holding.
        wire_Z: its first row on the wire.
        size_Z: its number of rows, at least one.
        tensor_rows: rows of each tensor of the holding.
        in_place: the first row, if the holding has all rows, some at least, in one piece and as
            they are on the wire.
    """

    held_Z: Int64
    wire_Z: Int64
    size_Z: Int64
    tensor_rows: int
    in_place: int | None
    device: torch.device
    table: Table | None = field(default=None, repr=False)
    _runs: dict[tuple[int, bool], list[_Run]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        held_Z: Int64,
        wire_Z: Int64,
        size_Z: Int64,
        tensor_rows: int,
        device: torch.device,
    ) -> Segments:
        """Create segments of any order and size; parts of a sum are in the order of addition."""
        if not size_Z.all():
            held_Z, wire_Z, size_Z = (rows_Z[size_Z > 0] for rows_Z in (held_Z, wire_Z, size_Z))
        in_place, shift_Z = None, held_Z - wire_Z
        if held_Z.size and (shift_Z == shift_Z[0]).all():
            in_one = held_Z[0] // tensor_rows == held_Z[-1] // tensor_rows
            in_place = int(shift_Z[0]) if in_one else None
        by_held = np.argsort(held_Z, kind="stable")
        held_Z, wire_Z, size_Z = (rows_Z[by_held] for rows_Z in (held_Z, wire_Z, size_Z))
        return cls(held_Z, wire_Z, size_Z, tensor_rows, in_place, device)

    @cached_property
    def first_T1(self) -> Int64:
        """Return the first segment of each sum, and the number of segments."""
        return np.append(_begins(self.held_Z), self.held_Z.size)

    @cached_property
    def most(self) -> int:
        """Return the most rows of a segment."""
        return int(self.size_Z.max(initial=0))

    @property
    def end(self) -> int:
        """Return the row of the holding behind its last segment."""
        return int(self.held_Z[-1] + self.size_Z[-1]) if self.held_Z.size else 0

    def view(self, held: Held) -> torch.Tensor:
        """Return the rows of the holding as they are on the wire, which is possible in place."""
        assert self.in_place is not None
        at, first = divmod(self.in_place, self.tensor_rows)
        return held[at][first : first + int(self.size_Z.sum())]

    def pack(self, held: Held, wire: torch.Tensor) -> None:
        """Copy rows from the holding to the wire."""
        self._copy(held, wire, packs=True)

    def unpack(self, wire: torch.Tensor, held: Held) -> None:
        """Copy rows from the wire to the holding."""
        self._copy(held, wire, packs=False)

    def _copy(self, held: Held, wire: torch.Tensor, *, packs: bool) -> None:
        for at, part in self._by_tensor:
            if self.table is not None:
                exchange_kernels(self.device).copy_segments(
                    held[at], wire, self.table, at * self.tensor_rows, part, self.most, packs=packs
                )
                continue
            source, target = (held[at], wire) if packs else (wire, held[at])
            for to, size, rows in self._runs_of(at, part, packs=packs):
                into = target[to : to + size]
                if isinstance(rows, int):
                    into.copy_(source[rows : rows + size])
                else:
                    torch.index_select(source, 0, rows, out=into)

    def add(self, wire: torch.Tensor, held: Held, *, adds: bool) -> None:
        """Sum rows on the wire in float32 and in order, and round once, to the holding.

        Args:
            adds: whether to add the sums to the holding's rows.
        """
        for at, part in self._by_tensor:
            sums = slice(*np.searchsorted(self.first_T1, (part.start, part.stop)).tolist())
            base = at * self.tensor_rows
            if self.table is not None:
                exchange_kernels(self.device).sum_segments(
                    wire, self.table, held[at], base, sums, self.most, adds=adds
                )
                continue
            size_Z, wire_Z = self.size_Z.tolist(), self.wire_Z.tolist()
            for first, last in pairwise(self.first_T1[sums.start : sums.stop + 1].tolist()):
                to, size = int(self.held_Z[first]) - base, size_Z[first]
                parts = [wire[row : row + size] for row in wire_Z[first:last]]
                total = sum(parts[1:], start=parts[0].float())
                target = held[at][to : to + size]
                target.add_(total) if adds else target.copy_(total)

    @cached_property
    def _by_tensor(self) -> list[tuple[int, slice]]:
        """Return the used tensors of the holding, each with its segments."""
        tensor_Z = self.held_Z // self.tensor_rows
        bounds = pairwise([*_begins(tensor_Z).tolist(), tensor_Z.size])
        return [(int(tensor_Z[first]), slice(first, last)) for first, last in bounds]

    def _runs_of(self, at: int, part: slice, *, packs: bool) -> list[_Run]:
        if (at, packs) not in self._runs:
            held_Z, wire_Z = self.held_Z[part] - at * self.tensor_rows, self.wire_Z[part]
            from_Z, to_Z = (held_Z, wire_Z) if packs else (wire_Z, held_Z)
            self._runs[at, packs] = _runs(from_Z, to_Z, self.size_Z[part], self.device)
        return self._runs[at, packs]


class _Run(NamedTuple):
    """Neighbouring rows to write, and those to read: the first of as many, or each."""

    to: int
    size: int
    rows: int | torch.Tensor


def _runs(from_Z: Int64, to_Z: Int64, size_Z: Int64, device: torch.device) -> list[_Run]:
    order_Z = np.argsort(to_Z)
    from_Z, to_Z, size_Z = from_Z[order_Z], to_Z[order_Z], size_Z[order_Z]
    begins = np.flatnonzero(to_Z[1:] != (to_Z + size_Z)[:-1]) + 1
    found = []
    for first, last in pairwise([0, *begins.tolist(), to_Z.size]):
        rows: int | torch.Tensor = int(from_Z[first])
        sizes = size_Z[first:last]
        if last > first + 1:
            shift = from_Z[first:last] - (np.cumsum(sizes) - sizes)
            if (shift != rows).any():
                gathered = np.repeat(shift, sizes) + np.arange(sizes.sum())
                (rows,) = upload_arrays([gathered], device)
        found.append(_Run(int(to_Z[first]), int(sizes.sum()), rows))
    return found


def _begins(values_Z: Int64) -> Int64:
    """Return the places where a value follows another one."""
    return np.flatnonzero(np.append(True, values_Z[1:] != values_Z[:-1])[: values_Z.size])


def upload_tables(parts: Sequence[Segments]) -> None:
    """Upload the tables of segments of one device at once, where kernels read them."""
    if not parts or exchange_kernels(parts[0].device) is None:
        return
    arrays = [
        array for part in parts for array in (part.held_Z, part.wire_Z, part.size_Z, part.first_T1)
    ]
    tensors = iter(upload_arrays(arrays, parts[0].device))
    for part in parts:
        part.table = Table(*(next(tensors) for _ in Table._fields))
