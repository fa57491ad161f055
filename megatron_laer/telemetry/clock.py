"""Moments in the order of the compute, and how much time lies between them.

On the CPU a moment is the wall clock. On CUDA it is an event on the current stream: the host
neither waits for it nor knows when it will be; durations are read once the device has passed it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch

Moment = Any  # a float of seconds, or torch.cuda.Event


class Clock(Protocol):
    """Where durations of work on one device come from."""

    def now(self) -> Moment:
        """This point of the caller's stream."""
        ...

    def passed(self, moment: Moment) -> bool:
        """Whether durations up to it can be read without waiting."""
        ...

    def seconds(self, start: Moment, end: Moment) -> float:
        """From one passed moment to another."""
        ...

    def catch_up(self) -> None:
        """Wait until every moment so far has passed."""
        ...


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return StreamClock() if device.type == "cuda" else HostClock()


class HostClock:
    """The wall clock, monotonic and the same in every process of a machine."""

    def now(self) -> Moment:
        """Seconds."""
        return time.perf_counter()

    def passed(self, moment: Moment) -> bool:
        """Always."""
        return True

    def seconds(self, start: Moment, end: Moment) -> float:
        """Their difference."""
        elapsed: float = end - start
        return elapsed

    def catch_up(self) -> None:
        """Nothing is ahead of the host."""


class StreamClock:
    """Events on the current CUDA stream."""

    def now(self) -> Moment:
        """Recorded, not waited for."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, moment: Moment) -> bool:
        """Asks, and does not wait."""
        return bool(moment.query())

    def seconds(self, start: Moment, end: Moment) -> float:
        """As the device measured them."""
        return float(start.elapsed_time(end)) * 1e-3

    def catch_up(self) -> None:
        """The one call here that the host waits in."""
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up durations, which may become known late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._running: deque[tuple[Moment, Moment]] = deque()

    def add(self, start: Moment, end: Moment) -> None:
        """Add what lies between."""
        self._running.append((start, end))
        self._settle()

    def take_ms(self) -> float:
        """The sum of what is known since the last call, in milliseconds."""
        self._settle()
        taken, self._seconds = self._seconds, 0.0
        return taken * 1e3

    def _settle(self) -> None:
        while self._running and self._clock.passed(self._running[0][1]):
            self._seconds += self._clock.seconds(*self._running.popleft())
