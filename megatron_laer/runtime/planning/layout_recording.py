"""Layout recording: the file of JSON lines that `--fsep-record-layouts` writes per FSEP group.

The first line describes the run. Each further one has a step at which layouts changed, and the new
layout of every layer:

    {"format":"megatron_laer-layouts","version":2,"num_ranks":N,"capacity":C,"num_experts":E,...,
     "layers":["layer 1",...],"crc":...}\\n
    {"step":7,"slots":[[expert of slot 0, ... of slot N*C-1], ... of the last layer],"crc":...}\\n

An empty slot is -1. Only with --fsep-sharding experts does the first line have a `sharding`. Only
with --fsep-homes does it have `homes`: the expert at each home position, layer by layer. Layouts by
pairs add `row_shares` to a line, an integer for each layer (`planner/by_pairs.py`): a replay's
guard decides by them as the run's did.

`files/json_lines.py` defines the checksum. `files/recording.py` explains how resumed runs continue
a file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_laer.choices import Sharding
from megatron_laer.files.checks import MAX_TEXT_BYTES, open_input, quoted
from megatron_laer.files.json_lines import (
    MAX_RANKS,
    check_shape,
    header_line,
    numbered_lines,
    read_header,
    read_line,
    sealed,
)
from megatron_laer.files.recording import RecordingFile
from megatron_laer.planner.by_pairs import WHOLE
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.state_header import MAX_SHARE

logger = logging.getLogger(__name__)

FORMAT = "megatron_laer-layouts"

# Settings that affect the use of layouts, by name; part of a recording's header.
RunSignature = Mapping[str, Any]


class LayoutRecorder:
    """Recording of every applied set of layouts, as lines of JSON, to replay a run from.

    A resumed run, or a step back, moves the lines from that step on to another file.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        signature: RunSignature,
        layers: Sequence[str],
        first_step: int,
    ) -> None:
        shape = _Shape(geometry, signature, layers)

        def recorded(path: Path) -> Iterator[tuple[int, int]]:
            with open_input(path) as file:
                for entry in _entries(file, path, shape, whole_lines_only=True):
                    yield entry.step, entry.end

        header = header_line(FORMAT, shape.header)
        self._file = RecordingFile(path, header, recorded, first_step)
        self._homes = shape.homes

    def begin_step(self, step: int) -> None:
        """Move lines from this step on to another file, if the step is repeated."""
        self._file.begin_step(step)

    def record(
        self, step: int, layouts: Sequence[ExpertLayout], row_shares: Sequence[int] = ()
    ) -> None:
        """Write the layouts, one per layer, that took effect with `step`; once per step."""
        if step != self._file.step:
            self.begin_step(step)
        slots = [
            home.layout_of_experts(layout).to_list()
            for home, layout in zip(self._homes, layouts, strict=True)
        ]
        entry: dict[str, Any] = {"step": step, "slots": slots}
        if any(share != WHOLE for share in row_shares):
            entry["row_shares"] = list(row_shares)
        self._file.append(sealed(entry))

    def close(self) -> None:
        self._file.close()


class LayoutRecording:
    """Recording to replay, as layouts of home positions.

    It is checked as a whole at first, and read again on demand to save memory.
    """

    def __init__(
        self, path: Path, geometry: Geometry, signature: RunSignature, layers: Sequence[str]
    ) -> None:
        self._path = path
        self._shape = _Shape(geometry, signature, layers)
        try:
            self._file = open_input(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"layout recording: cannot read {path}: {error}; give a directory written by "
                "--fsep-record-layouts in a run with the same parallel sizes"
            ) from error
        try:
            entries = _entries(self._file, path, self._shape)
            self._begins = {entry.step: entry.begin for entry in entries}
        except BaseException:
            self.close()
            raise

    def newest(self, step: int) -> int | None:
        """Return the last step up to this one at which layouts changed."""
        return max((at for at in self._begins if at <= step), default=None)

    def layouts(self, step: int) -> list[ExpertLayout] | None:
        change = self._change(step)
        return None if change is None else self._shape.by_position(change.layouts)

    def row_shares(self, step: int) -> list[int] | None:
        """Return the shares of rows of a step's layouts."""
        change = self._change(step)
        return None if change is None else change.row_shares

    def _change(self, step: int) -> _Change | None:
        if step not in self._begins:
            return None
        self._file.seek(self._begins[step])
        line = self._file.readline(self._shape.longest_line_bytes)
        return self._shape.change_of(line)

    def close(self) -> None:
        self._file.close()


def read_layouts(path: Path) -> Iterator[tuple[int, list[ExpertLayout]]]:
    """Yield a recording's steps with all layers' layouts; skip an incomplete last line."""
    with open_input(path) as file:
        shape = _recorded_shape(path, file.readline(MAX_TEXT_BYTES))
        file.seek(0)
        for entry in _entries(file, path, shape, whole_lines_only=True):
            after = file.tell()
            file.seek(entry.begin)
            changed = shape.change_of(file.readline(shape.longest_line_bytes))
            yield changed.step, changed.layouts
            file.seek(after)


def recorded_geometry(path: Path) -> Geometry | None:
    """Return the sharding and sizes of a recording, in one node; None if it cannot be read."""
    try:
        with open_input(path) as file:
            return _recorded_shape(path, file.readline(MAX_TEXT_BYTES)).geometry
    except (OSError, ValueError):
        return None  # replaying reports the problem


def recording_path(directory: str, group_index: int) -> Path:
    """Return the file of one FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"group-{group_index}.jsonl"


@dataclass(frozen=True)
class _Shape:
    """Shapes, layers and settings of a run, which its recording must share."""

    geometry: Geometry
    signature: RunSignature
    layers: Sequence[str]

    @property
    def header(self) -> dict[str, Any]:
        return {
            "num_ranks": self.geometry.num_ranks,
            "capacity": self.geometry.capacity,
            "num_experts": self.geometry.num_experts,
            **({} if self.geometry.sharding == Sharding.ROWS else {"sharding": "experts"}),
            **self.signature,
            "layers": list(self.layers),
        }

    @cached_property
    def homes(self) -> list[HomeOrder]:
        """Return the homes of each layer; raise ValueError for others than permutations."""
        given = self.signature.get("homes")
        if given is None:
            return [HomeOrder.stock(self.geometry.num_experts)] * len(self.layers)
        found = [HomeOrder(np.array(experts, dtype=np.int64)) for experts in given]
        sizes = {len(home.expert_E) for home in found}
        if len(found) != len(self.layers) or sizes != {self.geometry.num_experts}:
            raise ValueError(f"homes {quoted(given)} must be those of every layer's experts")
        return found

    def by_position(self, layouts: Sequence[ExpertLayout]) -> list[ExpertLayout]:
        return [
            home.layout_of_positions(layout)
            for home, layout in zip(self.homes, layouts, strict=True)
        ]

    @property
    def longest_line_bytes(self) -> int:
        """Bound the bytes of a step's line: a blank after each comma, names and brackets."""
        slots = self.geometry.num_ranks * self.geometry.capacity
        digits = max(len(str(number)) for number in (self.geometry.num_experts, EMPTY))
        share = len(str(MAX_SHARE)) + 2
        return 130 + len(self.layers) * (slots * (digits + 2) + 4 + share)

    def check_header(self, line: bytes) -> None:
        """Raise ValueError for another run's recording."""
        found = _read_header(line)
        if (sharding := _sharding(found)) != self.geometry.sharding:
            raise ValueError(
                f"was recorded with --fsep-sharding {sharding}, this run has "
                f"{self.geometry.sharding}"
            )
        if found.get("homes") != self.signature.get("homes"):
            raise ValueError(
                "was recorded with other homes of experts; give the --fsep-homes of that run"
            )
        if found != self.header:
            raise ValueError(f"was recorded for {quoted(found, 800)}, this run is {self.header}")

    def change_of(self, line: bytes) -> _Change:
        entry = read_line(line)
        row_shares = entry.pop("row_shares", [WHOLE] * len(self.layers))
        if set(entry) != {"step", "slots"}:
            raise ValueError(f"has {quoted(sorted(entry))}, expected 'slots' and 'step'")
        step, slots = entry["step"], entry["slots"]
        if type(step) is not int:
            raise ValueError(f"step {quoted(step)} is no integer")
        if len(slots) != len(self.layers):
            raise ValueError(f"has {len(slots)} layers, expected {len(self.layers)}")
        layouts = [ExpertLayout.from_slots(*self.geometry.shape, of_layer) for of_layer in slots]
        for layout in self.by_position(layouts):
            self.geometry.check_layout(layout)
        are_shares = [type(of) is int and 0 <= of <= MAX_SHARE for of in row_shares]
        if are_shares != [True] * len(self.layers):
            raise ValueError(
                f"row_shares {quoted(row_shares)} must be an integer in 0..{MAX_SHARE} per layer"
            )
        return _Change(step, layouts, row_shares)


def _read_header(line: bytes) -> dict[str, Any]:
    return read_header(line, FORMAT, "recording of layouts")


def _sharding(header: Mapping[str, Any]) -> Sharding:
    word = header.get("sharding", Sharding.ROWS.value)
    if word not in [*Sharding]:
        raise ValueError(f"sharding {quoted(word)} must be one of {', '.join(Sharding)}")
    return Sharding(word)


def _recorded_shape(path: Path, line: bytes) -> _Shape:
    try:
        header = _read_header(line)
        num_ranks, num_experts, capacity = (
            header.pop(name) for name in ("num_ranks", "num_experts", "capacity")
        )
        layers = header.pop("layers")
        sizes = {"num_ranks": num_ranks, "num_experts": num_experts, "capacity": capacity}
        check_shape({name: (value, MAX_RANKS) for name, value in sizes.items()}, layers)
        # Layouts do not depend on the node size.
        sharding = _sharding(header)
        header.pop("sharding", None)
        geometry = Geometry(num_ranks, num_experts, capacity, num_ranks, sharding)
        return _Shape(geometry, header, layers)
    except KeyError as error:
        raise ValueError(f"layout recording: {path}, line 1: lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"layout recording: {path}, line 1: {error}") from error


@dataclass(frozen=True)
class _Change:
    step: int
    layouts: list[ExpertLayout]
    row_shares: list[int]


@dataclass(frozen=True)
class _Entry:
    step: int
    begin: int
    end: int


def _entries(
    file: BinaryIO, path: Path, shape: _Shape, *, whole_lines_only: bool = False
) -> Iterator[_Entry]:
    """Yield all lines but the first, checked; `whole_lines_only` skips an incomplete last line."""
    begin, number, step = 0, 0, -1
    longest, kind = shape.longest_line_bytes, "layout recording: "
    lines = numbered_lines(file, path, longest, whole_only=whole_lines_only, kind=kind)
    for number, end, line in lines:
        try:
            if number == 1:
                shape.check_header(line)
            else:
                last = step
                step = shape.change_of(line).step
                if step <= last:
                    raise ValueError(f"step {step} is not above {last}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            is_whole = line.endswith(b"\n")
            hint = "" if is_whole else "; the line has no end: without it, the rest can be read"
            raise ValueError(f"layout recording: {path}, line {number}: {error}{hint}") from error
        if number > 1:
            yield _Entry(step, begin, end)
        begin = end
    if number == 0:
        raise ValueError(f"layout recording: {path} is empty")
