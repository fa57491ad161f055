"""A clock takes timestamps in the order of the compute, and tells how much time lies between.

On the CPU a timestamp is the wall clock. On CUDA it is an event on the current stream: the host
neither waits for it nor knows when it will be; durations are read once the device has passed it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch

Timestamp = Any  # a float of seconds, or torch.cuda.Event


class Clock(Protocol):
    """Measures durations of work on one device."""

    def now(self) -> Timestamp:
        """Return a timestamp at this point of the caller's stream."""
        ...

    def passed(self, timestamp: Timestamp) -> bool:
        """Return whether durations up to it can be read without waiting."""
        ...

    def seconds(self, start: Timestamp, end: Timestamp) -> float:
        """Return the seconds from one passed timestamp to another."""
        ...

    def catch_up(self) -> None:
        """Wait until every timestamp so far has passed."""
        ...


def make_clock(device: torch.device) -> Clock:
    return StreamClock() if device.type == "cuda" else HostClock()


class HostClock:
    """Reads the wall clock, monotonic and the same in every process of a machine."""

    def now(self) -> Timestamp:
        """Return the wall clock's seconds."""
        return time.perf_counter()

    def passed(self, timestamp: Timestamp) -> bool:
        """Return True: the host's time has passed."""
        return True

    def seconds(self, start: Timestamp, end: Timestamp) -> float:
        elapsed: float = end - start
        return elapsed

    def catch_up(self) -> None:
        """Do nothing, since nothing is ahead of the host."""


class StreamClock:
    """Records events on the current CUDA stream."""

    def now(self) -> Timestamp:
        """Record an event, without waiting for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, timestamp: Timestamp) -> bool:
        return bool(timestamp.query())

    def seconds(self, start: Timestamp, end: Timestamp) -> float:
        """Return the seconds that the device measured."""
        return float(start.elapsed_time(end)) * 1e-3

    def catch_up(self) -> None:
        """Wait for the device; no other call here does."""
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up durations, which may become known late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._running: deque[tuple[Timestamp, Timestamp]] = deque()

    def add(self, start: Timestamp, end: Timestamp) -> None:
        self._running.append((start, end))
        self._add_passed()

    def take_ms(self) -> float:
        """Return the sum of what became known since the last call, in milliseconds."""
        self._add_passed()
        taken, self._seconds = self._seconds, 0.0
        return taken * 1e3

    def _add_passed(self) -> None:
        while self._running and self._clock.passed(self._running[0][1]):
            self._seconds += self._clock.seconds(*self._running.popleft())
