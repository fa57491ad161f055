"""`Timeline` writes `--fsep-timeline`: a rank's trace of a few steps, for Perfetto.

Each rank is a process with four tracks: compute, tokens, and the communication streams of
parameters and gradients. Compute has phases, which start and end at token exchanges, and the waits
in them. The trace is written once, after its last step; nothing here changes the order of work.
In the combined 1F1B schedule a phase may hold compute of two microbatches, as the title says.

Format: the JSON of Chrome's trace viewer, complete events (`"ph": "X"`), times in microseconds
since 1970. To merge files of several ranks, join their `traceEvents`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_laer.files import run_mark
from megatron_laer.files.writing import free_name, open_exclusively, write_file
from megatron_laer.telemetry.clock import Clock, Timestamp, make_clock
from megatron_laer.telemetry.trace_events import COMPUTE, TOKENS, Activity, Kind, trace_events

logger = logging.getLogger(__name__)

# Steps of this run, from 0; the first ones allocate memory and have no plan yet.
FIRST_STEP, NUM_STEPS = 2, 3
TWO_MICROBATCHES = ": a phase holds compute of two microbatches (combined 1F1B)"


# Starts a named range in the device's profiler, and returns the function that ends it. Unlike
# `with` blocks, ranges may end in another thread: a phase of forward ends in autograd's.
OpenRange = Callable[[str], Callable[[], None]]


@dataclass(frozen=True)
class _Open:
    activity: Activity
    start: Timestamp
    end_range: Callable[[], None]


class Timeline:
    """Recorder of one rank's trace.

    The file is created empty at once, so that a run does not train in vain. A resumed run, one with
    `origin_step` above 0, adds its first recorded step to the name, and a number if that is taken.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        clock: Clock,
        open_range: OpenRange,
        origin_step: int,
        note: str = "",
    ) -> None:
        self._title = f"rank {rank}{note}"
        self._rank, self._clock, self._open_range = rank, clock, open_range
        self._steps = range(origin_step + FIRST_STEP, origin_step + FIRST_STEP + NUM_STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        if origin_step > 0:
            path = free_name(path.with_stem(f"{path.stem}.step-{self._steps[0] + 1}"))
        self._path = path
        # Open until the end, so that no other run uses the name.
        self._file = open_exclusively(path)
        if path.stat().st_size > 0:
            self._file = _moved_aside(path, self._file)
        self._is_recording = False
        self._origin: tuple[Timestamp, int] | None = None
        self._intervals: list[tuple[str, Activity, Timestamp, Timestamp]] = []
        self._phase: _Open | None = None
        self._exchange: _Open | None = None
        self._step_start: Timestamp = None

    def begin_step(self, step: int) -> None:
        if step not in self._steps:
            return
        if self._origin is None:
            # Synchronise device and host once, so that ranks can be compared.
            self._clock.catch_up()
            self._origin = self._clock.now(), time.time_ns()
        self._step_start = self._clock.now()
        self._end_phase(self._step_start)
        self._is_recording = True
        self._phase = self._open(Activity(Kind.DENSE), self._step_start)

    def end_step(self, step: int) -> None:
        if not self._is_recording:
            return
        self._end_phase(self._clock.now())
        self.add(COMPUTE, Activity(Kind.STEP, str(step + 1)), self._step_start, self._clock.now())
        self._is_recording = False
        if step + 1 not in self._steps:
            self.close()

    def add(self, track: str, activity: Activity, start: Timestamp, end: Timestamp) -> None:
        if self._is_recording:
            self._intervals.append((track, activity, start, end))

    def begin_exchange(self, activity: Activity) -> None:
        now = self._clock.now()
        self._end_phase(now)
        self._exchange = self._open(activity, now)

    def end_exchange(self, phase: Activity) -> None:
        """End a token exchange and start a phase of compute."""
        now = self._clock.now()
        self._close(TOKENS, self._exchange, now)
        self._exchange = None
        self._phase = self._open(phase, now)

    def close(self) -> None:
        """Write the recorded steps, once; without any, remove the empty file."""
        if self._file.closed:
            return
        self._is_recording = False
        for opened in (self._phase, self._exchange):
            if opened is not None:
                opened.end_range()
        self._phase = self._exchange = None
        self._clock.catch_up()
        try:
            with self._file:
                if self._origin is None:
                    self._path.unlink()
                    logger.warning(
                        "FSEP: no timeline %s: the run ended before step %d",
                        self._path,
                        self._steps[0] + 1,
                    )
                else:
                    if self._steps[0] == FIRST_STEP:
                        run_mark.mark(self._path)
                    trace = {"displayTimeUnit": "ms", "traceEvents": list(self._events())}
                    write_file(self._path, json.dumps(trace))
        except OSError as error:  # a run does not end for a picture
            logger.warning("FSEP: the timeline %s could not be written: %s", self._path, error)

    def _end_phase(self, now: Timestamp) -> None:
        self._close(COMPUTE, self._phase, now)
        self._phase = None

    def _open(self, activity: Activity, now: Timestamp) -> _Open:
        return _Open(activity, now, self._open_range(str(activity)))

    def _close(self, track: str, opened: _Open | None, now: Timestamp) -> None:
        if opened is not None:
            opened.end_range()
            self.add(track, opened.activity, opened.start, now)

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._origin is not None
        origin, origin_ns = self._origin

        def microseconds(timestamp: Timestamp) -> float:
            return round(origin_ns / 1e3 + self._clock.seconds(origin, timestamp) * 1e6, 1)

        intervals = (
            (track, str(activity), microseconds(start), microseconds(end))
            for track, activity, start, end in self._intervals
        )
        return trace_events(self._rank, self._title, intervals)


def _moved_aside(path: Path, file: BinaryIO) -> BinaryIO:
    """Move this run's trace from before its restart to another file; open an empty one."""
    with file:
        if not run_mark.is_of_this_run(path):
            raise ValueError(
                f"{path} holds the timeline of an earlier run, and this run begins at step 0; give "
                "an empty folder, or resume the run that wrote it from a checkpoint"
            )
        beside = free_name(path.with_stem(f"{path.stem}.cut-from-0"))
        os.replace(path, beside)
    logger.warning("FSEP: %s: the timeline from step 0 on has been moved to %s", path, beside.name)
    return open_exclusively(path)


def open_timeline(
    directory: str, rank: int, device: torch.device, first_step: int, *, by_parts: bool
) -> Timeline:
    """Open a rank's timeline; with `by_parts`, two microbatches' parts of layers alternate."""
    clock, open_range = make_clock(device), _nvtx_range if device.type == "cuda" else _no_range
    note = TWO_MICROBATCHES if by_parts else ""
    return Timeline(timeline_path(directory, rank), rank, clock, open_range, first_step, note)


def timeline_path(directory: str, rank: int) -> Path:
    return Path(directory) / f"rank-{rank}.json"


def _nvtx_range(name: str) -> Callable[[], None]:
    return functools.partial(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))


def _no_range(name: str) -> Callable[[], None]:
    return lambda: None
