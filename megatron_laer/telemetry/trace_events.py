"""Activities of a rank, and their events in the JSON of Chrome's trace viewer, for Perfetto.

Recorded and predicted intervals have the same four tracks per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

COMPUTE, TOKENS = "compute", "tokens"
TRACKS = (COMPUTE, TOKENS, "parameters", "gradients")


class Kind(StrEnum):
    """Kind of an activity of compute, tokens or a communication stream."""

    STEP = "step"
    DENSE = "dense layers"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"
    RESTORE = "restore"
    CHANGE = "change"
    REDUCE = "reduce"
    EXCHANGES = "exchanges"  # of a calibration


@dataclass(frozen=True)
class Activity:
    """Key of intervals: an activity of one layer in one direction, or compute's wait for it.

    `layer` is a step's number, from 1, and empty for dense layers. `inside_node` marks the second
    stage of a token exchange through nodes.
    """

    kind: Kind
    layer: str = ""
    backward: bool = False
    waits: bool = False
    inside_node: bool = False

    def __str__(self) -> str:
        label = f"{self.kind} {self.layer}" if self.layer else self.kind.value
        label += ", inside node" * self.inside_node + ", backward" * self.backward
        return "wait: " * self.waits + label


def trace_events(
    process: int, name: str, intervals: Iterable[tuple[str, str, float, float]]
) -> Iterator[dict[str, Any]]:
    """Yield one process's events; intervals are track, label, start and end in microseconds."""

    def named(kind: str, value: str, **where: int) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": process, "args": {"name": value}, **where}

    yield named("process_name", name)
    for place, track in enumerate(TRACKS):
        yield named("thread_name", track, tid=place)
    for track, label, first, last in intervals:
        yield {
            "ph": "X",
            "name": label,
            "cat": track,
            "pid": process,
            "tid": TRACKS.index(track),
            "ts": first,
            "dur": round(last - first, 1),
        }
