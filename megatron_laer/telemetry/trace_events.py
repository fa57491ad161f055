"""Intervals become events of a timeline here, in the JSON of Chrome's trace viewer, for Perfetto.

A process has four tracks, whether its intervals were recorded in a run or predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

COMPUTE, TOKENS = "compute", "tokens"
TRACKS = (COMPUTE, TOKENS, "parameters", "gradients")


def trace_events(
    process: int, name: str, intervals: Iterable[tuple[str, str, float, float]]
) -> Iterator[dict[str, Any]]:
    """Yield the events of one process.

    Args:
        intervals: track, label, begin and end in microseconds.
    """

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
