"""`StepTimes` adds up the activities of one rank's compute in each step.

It never waits for the device: on CUDA a step's sums are readable once its last interval has passed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from megatron_laer.telemetry.clock import Clock, Timestamp
from megatron_laer.telemetry.trace_events import COMPUTE, Activity, Kind

# Key of the whole step in the sums of `StepTimes`.
STEP = Activity(Kind.STEP)


class IntervalListener(Protocol):
    """Listener to intervals, token exchanges and phases, such as a timeline."""

    def add(self, track: str, activity: Activity, start: Timestamp, end: Timestamp) -> None: ...

    def begin_exchange(self, activity: Activity) -> None: ...

    def end_exchange(self, phase: Activity) -> None: ...


@dataclass(frozen=True)
class Listeners:
    """Several listeners as one."""

    listeners: tuple[IntervalListener, ...]

    def add(self, track: str, activity: Activity, start: Timestamp, end: Timestamp) -> None:
        for listener in self.listeners:
            listener.add(track, activity, start, end)

    def begin_exchange(self, activity: Activity) -> None:
        for listener in self.listeners:
            listener.begin_exchange(activity)

    def end_exchange(self, phase: Activity) -> None:
        for listener in self.listeners:
            listener.end_exchange(phase)


def join(*listeners: IntervalListener | None) -> IntervalListener | None:
    """Combine listeners, ignoring None; return None without any."""
    there = tuple(listener for listener in listeners if listener is not None)
    return there[0] if len(there) == 1 else Listeners(there) if there else None


@dataclass
class _StepIntervals:
    start: Timestamp
    end: Timestamp = None
    intervals: list[tuple[Activity, Timestamp, Timestamp]] = field(default_factory=list)


class StepTimes:
    """Listener that adds up one rank's intervals of compute and tokens for each step, in order.

    Communication streams run in parallel and do not count, nor do intervals between steps.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._current: _StepIntervals | None = None
        self._ended: deque[_StepIntervals] = deque()
        self._is_caught_up = False
        self._open: tuple[Activity, Timestamp] | None = None

    def begin_step(self) -> None:
        self._current, self._open = _StepIntervals(self._clock.now()), None

    def end_step(self) -> None:
        if self._current is not None:
            self._current.end = self._clock.now()
            self._ended.append(self._current)
            self._is_caught_up = False
        self._current = None

    def add(self, track: str, activity: Activity, start: Timestamp, end: Timestamp) -> None:
        if track == COMPUTE and self._current is not None:
            self._current.intervals.append((activity, start, end))

    def begin_exchange(self, activity: Activity) -> None:
        """Start a token exchange, which ends the phase before it."""
        if self._current is None:
            return
        now = self._clock.now()
        if self._open is not None:
            self._current.intervals.append((*self._open, now))
        self._open = activity, now

    def end_exchange(self, phase: Activity) -> None:
        self.begin_exchange(phase)

    def take(self) -> dict[Activity, float] | None:
        """Return the oldest step's seconds by activity; None unless the device has passed one."""
        if not self._ended:
            return None
        if not self._is_caught_up and not self._clock.passed(self._ended[0].end):
            return None
        step = self._ended.popleft()
        seconds = {STEP: self._clock.seconds(step.start, step.end)}
        for activity, start, end in step.intervals:
            seconds[activity] = seconds.get(activity, 0.0) + self._clock.seconds(start, end)
        return seconds

    def catch_up(self) -> None:
        self._clock.catch_up()
        self._is_caught_up = True

    def forget(self) -> None:
        """Drop every step not yet taken, and ignore intervals until the next step."""
        self._current = self._open = None
        self._ended.clear()
