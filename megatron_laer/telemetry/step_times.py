"""`StepTimes` adds up the activities of one rank's compute in each step.

It never waits for the device: on CUDA a step's sums are readable once its last interval has passed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.clock import Clock, Timestamp

# Key of the whole step in the sums of `StepTimes`.
STEP = Activity(Kind.STEP)


@dataclass
class _StepIntervals:
    start: Timestamp
    end: Timestamp = None
    intervals: list[tuple[Activity, Timestamp, Timestamp]] = field(default_factory=list)


class StepTimes:
    """Sums of one rank's token exchanges, phases of compute and waits for each step, in order.

    Those between steps do not count.
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

    def add(self, activity: Activity, start: Timestamp, end: Timestamp) -> None:
        if self._current is not None:
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
