"""Clocks with timestamps in the order of the compute.

On the CPU a timestamp is the wall clock. On CUDA it is an event on the current stream. The host
does not wait for it; durations are readable once the device has passed it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

Timestamp = Any  # a float of seconds, or torch.cuda.Event


def make_clock(device: torch.device) -> Clock:
    return StreamClock() if device.type == "cuda" else Clock()


class Clock:
    """Clock of work on one device; of the CPU, where it is the same in every process."""

    def now(self) -> Timestamp:
        """Return a timestamp at this point of the caller's stream."""
        return time.perf_counter()

    def passed(self, timestamp: Timestamp) -> bool:
        """Return whether durations up to it can be read without waiting."""
        return True

    def seconds(self, start: Timestamp, end: Timestamp) -> float:
        """Return the seconds from one passed timestamp to another."""
        return float(end - start)

    def catch_up(self) -> None:
        """Wait until every timestamp so far has passed."""


class StreamClock(Clock):
    """Clock of events on the current CUDA stream; only `catch_up` waits for the device."""

    def now(self) -> Timestamp:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, timestamp: Timestamp) -> bool:
        return bool(timestamp.query())

    def seconds(self, start: Timestamp, end: Timestamp) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def catch_up(self) -> None:
        torch.cuda.synchronize()


class Stopwatch:
    """Sum of durations, which may become known late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._running: deque[tuple[Timestamp, Timestamp]] = deque()

    def add(self, start: Timestamp, end: Timestamp) -> None:
        self._running.append((start, end))
        self._add_passed()

    def take_ms(self) -> float:
        """Return the milliseconds that became known since the last call."""
        self._add_passed()
        taken, self._seconds = self._seconds, 0.0
        return taken * 1e3

    def _add_passed(self) -> None:
        while self._running and self._clock.passed(self._running[0][1]):
            self._seconds += self._clock.seconds(*self._running.popleft())
