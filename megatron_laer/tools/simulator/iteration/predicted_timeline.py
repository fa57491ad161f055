"""Timeline of a predicted iteration, with the tracks of a recorded one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_laer.telemetry.trace_events import COMPUTE, trace_events
from megatron_laer.tools.simulator.iteration.clocks import Recorder, Seconds

_SHOWN_RANKS = 4


class PredictedTimeline:
    """Intervals of a few ranks of each stage, evenly spread over the group."""

    def __init__(self, ranks: int) -> None:
        self._ranks: list[int] = np.unique(
            np.linspace(0, ranks - 1, min(ranks, _SHOWN_RANKS)).astype(int)
        ).tolist()
        self._intervals: dict[tuple[str, int, int], list[tuple[str, str, float, float]]] = {}

    def recorder(self, method: str, stage: int) -> Recorder:
        of_rank = [self._intervals.setdefault((method, stage, rank), []) for rank in self._ranks]

        def record(track: str, label: str, begin_N: Seconds, end_N: Seconds) -> None:
            for rank, intervals in zip(self._ranks, of_rank, strict=True):
                begin_us, end_us = float(begin_N[rank]) * 1e6, float(end_N[rank]) * 1e6
                if end_us > begin_us:
                    intervals.append((track, label, round(begin_us, 1), round(end_us, 1)))

        return record

    def content(self) -> bytes:
        """Return the file's content, with a process for each method, stage and rank."""
        events: list[dict[str, Any]] = []
        for process, ((method, stage, rank), found) in enumerate(self._intervals.items()):
            name = f"{method}, stage {stage}, rank {rank} of the group"
            step = COMPUTE, "step 1", 0.0, max(end for _, _, _, end in found)
            events += trace_events(process, name, [step, *_joined(found)])
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode()


def _joined(
    found: Sequence[tuple[str, str, float, float]],
) -> list[tuple[str, str, float, float]]:
    joined: list[tuple[str, str, float, float]] = []
    for track, label, begin, end in found:
        if joined and joined[-1][:2] == (track, label) and begin - joined[-1][3] < 0.15:
            joined[-1] = track, label, joined[-1][2], end
        else:
            joined.append((track, label, begin, end))
    return joined
