"""Megatron's logs next to a run's recordings: which are the run's own, and which are stock's.

Recordings have the number of their run, and FSEP prints it before the first step. Iterations after
this number are the run's. A log of stock has neither a number nor any of FSEP's metrics.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_laer.files.checks import naming, one_line, quoted
from megatron_laer.files.recording import run_of
from megatron_laer.telemetry.log import LOSS, RUN, STEP_MS, LoggedRun, Step, read_log, window
from megatron_laer.tools.report.metrics_recording import MetricsRecording
from megatron_laer.tools.report.run_files import RunFiles

logger = logging.getLogger(__name__)

# The first losses of stock and FSEP differ by rounding, those of other models or data by more.
_SAME_LOSS = 0.01
_SAMPLES = "consumed samples"


@dataclass(frozen=True)
class Measured:
    """Median times of a step in a run's logs and in stock's, over the same iterations."""

    own_logs: Sequence[str]
    stock_log: str
    own_ms: float
    stock_ms: float
    iterations: range

    @property
    def gain(self) -> float:
        return self.stock_ms / self.own_ms


@dataclass(frozen=True)
class Logs:
    """A run's losses by iteration, from 1, with the names of their logs, and notes on all logs.

    `iterations` are those over which the run is averaged: the same for the measured gain and for
    all that is computed from recordings.
    """

    loss: Sequence[tuple[int, float]]
    names: Sequence[str]
    measured: Measured | None
    iterations: range
    notes: Sequence[str]


def read_logs(files: RunFiles, recording: MetricsRecording) -> Logs:
    """Read the logs next to a group's recordings; those of other runs are not used.

    Training prints the number of the first group, whose recordings may be those `of_other_groups`.
    """
    numbers = {run_of(path) for path in (files.metrics, *files.of_other_groups)} - {None}
    own, stock, notes, unread = list[LoggedRun](), list[LoggedRun](), list[str](), list[str]()
    for path in files.logs:
        try:
            if not path.is_file():
                raise ValueError(f"{quoted(path.name)} is no regular file")
            with naming(path):
                log = read_log(one_line(path.name), path)
        except ValueError as error:
            unread.append(one_line(error))
            continue
        if not log.steps:
            continue
        runs = {step.run for step in log.steps.values()} - {None}
        if numbers & runs:
            log.steps = {at: step for at, step in log.steps.items() if step.run in numbers}
            own.append(log)
        elif runs:
            notes.append(
                f"{quoted(path.name)} is the log of the run {', '.join(sorted(map(str, runs)))}, "
                f"and not of {run_of(files.metrics)}, so it is not used."
            )
        elif any(name.startswith("fsep_") for of in log.steps.values() for name in of.values):
            notes.append(
                f"{quoted(path.name)} has FSEP's metrics and no line with {RUN}, which names the "
                "run, so it is not used."
            )
        else:
            stock.append(log)
    if unread:
        logger.warning("logs that are not read: %s", "; ".join(unread))
        notes.append(f"Logs that are not read: {'; '.join(unread)}.")
    own.sort(key=lambda log: max(log.steps))  # repeated steps as in the later log
    steps = {at: step for log in own for at, step in log.steps.items()}
    loss = sorted((at, of.values[LOSS]) for at, of in steps.items() if LOSS in of.values)
    recorded, names = recording.iterations_T.tolist(), [log.name for log in own]
    found = (_measured(names, steps, log, recorded) for log in stock)
    measured = next(filter(None, found), None)
    for log in stock:
        if measured is None or measured.stock_log != log.name:
            why = "" if measured else ": it has other batches or losses, or no step in common"
            notes.append(
                f"{quoted(log.name)} has no run's number and none of FSEP's metrics, so it is "
                f"stock's; its times are not compared{why if own else ''}."
            )
    iterations = measured.iterations if measured else window(recorded)
    return Logs(loss, names, measured, iterations, notes)


def _measured(
    names: Sequence[str], own: Mapping[int, Step], stock: LoggedRun, recorded: Sequence[int]
) -> Measured | None:
    """Compare the times of two runs of one model on the same data; None for others."""
    both = {
        at: (own[at].values, step.values)
        for at, step in sorted(stock.steps.items())
        if at in own and {LOSS, STEP_MS} <= own[at].values.keys() & step.values.keys()
    }
    if not both:
        return None
    mine, theirs = next(iter(both.values()))
    is_same = abs(mine[LOSS] - theirs[LOSS]) <= _SAME_LOSS * abs(theirs[LOSS])
    if not is_same or any(one.get(_SAMPLES) != other.get(_SAMPLES) for one, other in both.values()):
        return None
    iterations = window([at for at in recorded if at <= max(both)])
    times = [
        (one[STEP_MS], other[STEP_MS]) for at, (one, other) in both.items() if at in iterations
    ]
    if not times:
        return None
    own_ms, stock_ms = map(statistics.median, zip(*times, strict=True))
    return Measured(names, stock.name, own_ms, stock_ms, iterations)
