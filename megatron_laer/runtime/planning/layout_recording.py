"""Layout recording: the file of JSON lines that `--fsep-record DIR layouts` writes per FSEP group.

The first line describes the run. Each further one has a step at which layouts changed, and the new
layout of every layer:

    {"format":"megatron_laer-layouts","version":2,"run":...,"num_ranks":N,"capacity":C,
     "num_experts":E,...,"layers":["layer 1",...],"crc":...}\\n
    {"record":1,"step":7,"slots":[[expert of slot 0, ... of slot N*C-1], ... of the last layer],
     "crc":...}\\n

An empty slot is -1. Only with --fsep-sharding experts does the first line have a `sharding`. Only
with --fsep-homes does it have `homes`: the expert at each home position, layer by layer.

`files/json_lines.py` defines the checksum. `files/recording.py` has the number of the run, and how
resumed runs continue a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.choices import Sharding
from megatron_laer.files.checks import MAX_TEXT_BYTES, open_input, quoted
from megatron_laer.files.json_lines import MAX_RANKS, check_shape, numbered_lines
from megatron_laer.files.recording import RecordingFile, read_record, read_recording_header
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import EMPTY, ExpertLayout

FORMAT = "megatron_laer-layouts"

# Settings of a run, by name; part of a recording's header.
RunSignature = Mapping[str, Any]


class LayoutRecorder:
    """Recording of every applied set of layouts, as lines of JSON.

    A resumed run, or a step back, moves the lines from that step on to another file.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        signature: RunSignature,
        layers: Sequence[str],
        first_step: int,
        run: str | None = None,
    ) -> None:
        shape = _Shape(geometry, signature, layers)
        self._file = RecordingFile(path, FORMAT, shape.header, _recorded, first_step, run)
        self._homes = shape.homes

    def begin_step(self, step: int) -> None:
        """Move lines from this step on to another file, if the step is repeated."""
        self._file.begin_step(step)

    def record(self, step: int, layouts: Sequence[ExpertLayout]) -> None:
        """Write the layouts, one per layer, that took effect with `step`; once per step."""
        if step != self._file.step:
            self.begin_step(step)
        slots = [
            home.layout_of_experts(layout).to_list()
            for home, layout in zip(self._homes, layouts, strict=True)
        ]
        self._file.append_line({"step": step, "slots": slots})

    def close(self) -> None:
        self._file.close()


def read_layouts(path: Path) -> Iterator[tuple[int, list[ExpertLayout]]]:
    """Yield a recording's steps with all layers' layouts; skip an incomplete last line."""
    for step, layouts, _ in _changes(path):
        yield step, layouts


def recording_path(directory: str, group_index: int) -> Path:
    """Return the file of one FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"group-{group_index}.jsonl"


@dataclass(frozen=True)
class _Shape:
    """Shapes, layers and settings of a recorded run."""

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

    @property
    def longest_line_bytes(self) -> int:
        """Bound the bytes of a step's line: a blank after each comma, names and brackets."""
        slots = self.geometry.num_ranks * self.geometry.capacity
        digits = max(len(str(number)) for number in (self.geometry.num_experts, EMPTY))
        return 170 + len(self.layers) * (slots * (digits + 2) + 4)

    def change_of(self, entry: Mapping[str, Any]) -> tuple[int, list[ExpertLayout]]:
        """Return a line's step, and the new layout of every layer."""
        if set(entry) != {"step", "slots"}:
            raise ValueError(f"has {quoted(sorted(entry))}, expected 'slots' and 'step'")
        step, slots = entry["step"], entry["slots"]
        if type(step) is not int:
            raise ValueError(f"step {quoted(step)} is no integer")
        if len(slots) != len(self.layers):
            raise ValueError(f"has {len(slots)} layers, expected {len(self.layers)}")
        layouts = [ExpertLayout.from_slots(*self.geometry.shape, of_layer) for of_layer in slots]
        for home, layout in zip(self.homes, layouts, strict=True):
            self.geometry.check_layout(home.layout_of_positions(layout))
        return step, layouts


def _sharding(header: Mapping[str, Any]) -> Sharding:
    word = header.get("sharding", Sharding.ROWS.value)
    if word not in [*Sharding]:
        raise ValueError(f"sharding {quoted(word)} must be one of {', '.join(Sharding)}")
    return Sharding(word)


def _recorded_shape(path: Path, line: bytes) -> tuple[_Shape, int]:
    try:
        header, seed = read_recording_header(line, FORMAT, "recording of layouts")
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
        return _Shape(geometry, header, layers), seed
    except KeyError as error:
        raise ValueError(f"layout recording: {path}, line 1: lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"layout recording: {path}, line 1: {error}") from error


def _recorded(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the step of every whole line but the first, and the offset of its end."""
    return ((step, end) for step, _, end in _changes(path))


def _changes(path: Path) -> Iterator[tuple[int, list[ExpertLayout], int]]:
    """Yield the step, layouts and offset of the end of every whole line but the first."""
    with open_input(path) as file:
        shape, seed = _recorded_shape(path, file.readline(MAX_TEXT_BYTES))
        file.seek(0)
        last = -1
        lines = numbered_lines(file, path, shape.longest_line_bytes, kind="layout recording: ")
        for number, end, line in lines:
            if number == 1:
                continue
            try:
                step, layouts = shape.change_of(read_record(line, path, number, seed))
                if step <= last:
                    raise ValueError(f"step {step} is not above {last}")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"layout recording: {path}, line {number}: {error}") from error
            last = step
            yield step, layouts, end
