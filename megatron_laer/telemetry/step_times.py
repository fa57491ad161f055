"""`StepTimes` adds up what the compute of one rank did in each step, by name.

It hears of the same intervals as a `Timeline`, of every step instead of a few, and keeps their sums
instead of the intervals. It waits for no device: on CUDA a step's sums can be read once the device
has passed its last interval.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from megatron_laer.telemetry.clock import Clock, Timestamp
from megatron_laer.telemetry.trace_events import COMPUTE


class IntervalListener(Protocol):
    """Hears of token exchanges and of the phases between them: a timeline, or sums of a step."""

    def add(self, track: str, label: str, start: Timestamp, end: Timestamp) -> None:
        """Take an interval on a track."""
        ...

    def begin_exchange(self, label: str) -> None:
        """Take the begin of a token exchange."""
        ...

    def end_exchange(self, phase: str) -> None:
        """Take the end of a token exchange, with the phase that follows."""
        ...


@dataclass(frozen=True)
class Listeners:
    """Tells several listeners the same."""

    listeners: tuple[IntervalListener, ...]

    def add(self, track: str, label: str, start: Timestamp, end: Timestamp) -> None:
        """Take an interval on a track."""
        for listener in self.listeners:
            listener.add(track, label, start, end)

    def begin_exchange(self, label: str) -> None:
        """Take the begin of a token exchange."""
        for listener in self.listeners:
            listener.begin_exchange(label)

    def end_exchange(self, phase: str) -> None:
        """Take the end of a token exchange."""
        for listener in self.listeners:
            listener.end_exchange(phase)


def join(*listeners: IntervalListener | None) -> IntervalListener | None:
    """Return one listener for those that are there; None without any."""
    there = tuple(listener for listener in listeners if listener is not None)
    return there[0] if len(there) == 1 else Listeners(there) if there else None


@dataclass
class _Step:
    """Holds the intervals of a step."""

    start: Timestamp
    end: Timestamp = None
    intervals: list[tuple[str, Timestamp, Timestamp]] = field(default_factory=list)


class StepTimes:
    """Hears of one rank's intervals and gives the sums of each step, in order.

    Intervals of other tracks than the compute's and the tokens' run beside these, and are left out;
    so is what happens between two steps, such as an evaluation.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._current: _Step | None = None
        self._ended: deque[_Step] = deque()
        self._is_caught_up = False
        self._open: tuple[str, Timestamp] | None = None

    def begin_step(self) -> None:
        """Begin a step."""
        self._current, self._open = _Step(self._clock.now()), None

    def end_step(self) -> None:
        """End a step, whose sums `take` will give."""
        if self._current is not None:
            self._current.end = self._clock.now()
            self._ended.append(self._current)
            self._is_caught_up = False
        self._current = None

    def add(self, track: str, label: str, start: Timestamp, end: Timestamp) -> None:
        """Take a wait of the compute."""
        if track == COMPUTE and self._current is not None:
            self._current.intervals.append((label, start, end))

    def begin_exchange(self, label: str) -> None:
        """Take the begin of a token exchange, which ends the phase before it."""
        self._next(label)

    def end_exchange(self, phase: str) -> None:
        """Take the end of a token exchange, with the phase that follows."""
        self._next(phase)

    def take(self) -> dict[str, float] | None:
        """Return the seconds of the oldest step that was not taken, by name; the whole under "".

        Returns:
            None where there is no such step, or the device has not passed it.
        """
        if not self._ended:
            return None
        if not self._is_caught_up and not self._clock.passed(self._ended[0].end):
            return None
        step = self._ended.popleft()
        seconds = {"": self._clock.seconds(step.start, step.end)}
        for label, start, end in step.intervals:
            seconds[label] = seconds.get(label, 0.0) + self._clock.seconds(start, end)
        return seconds

    def catch_up(self) -> None:
        """Wait until every step can be taken, at the end of a run."""
        self._clock.catch_up()
        self._is_caught_up = True

    def forget(self) -> None:
        """Drop every step that was not taken, and hear nothing until the next begins."""
        self._current = self._open = None
        self._ended.clear()

    def _next(self, label: str) -> None:
        if self._current is None:
            return
        now = self._clock.now()
        if self._open is not None:
            self._current.intervals.append((self._open[0], self._open[1], now))
        self._open = label, now
