"""Megatron's logs next to a run's recordings: which are the run's own, and which are stock's.

Recordings have the number of their run, and FSEP prints it before the first step. Iterations after
this number are the run's. A log of stock has neither a number nor any of FSEP's metrics.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_laer.files.checks import naming, one_line, quoted
from megatron_laer.files.recording import run_of
from megatron_laer.telemetry.log import LOSS, RUN, STEP_MS, LoggedRun, Step, read_log, steady
from megatron_laer.tools.report.run_files import RunFiles

# The first losses of stock and FSEP differ by rounding, those of other models or data by more.
_SAME_LOSS = 0.01
_SAMPLES = "consumed samples"


@dataclass(frozen=True)
class Measured:
    """Median times of a step in a run's log and in stock's, over some of the iterations of both."""

    stock_log: str
    own_ms: float
    stock_ms: float
    first: int
    last: int

    @property
    def gain(self) -> float:
        return self.stock_ms / self.own_ms


@dataclass(frozen=True)
class Logs:
    """A run's losses by iteration, from 1, with the names of their logs, and notes on all logs."""

    loss: Sequence[tuple[int, float]] = ()
    names: Sequence[str] = ()
    measured: Measured | None = None
    notes: Sequence[str] = ()


def read_logs(files: RunFiles) -> Logs:
    """Read the logs next to a group's recordings; those of other runs are not used.

    Training prints the number of the first group, whose recordings may be those `of_other_groups`.
    """
    numbers = {run_of(path) for path in (files.metrics, *files.of_other_groups)} - {None}
    own, stock, notes = list[LoggedRun](), list[LoggedRun](), list[str]()
    for path in files.logs:
        if not path.is_file():
            notes.append(f"{quoted(path.name)} is no regular file, and is not read.")
            continue
        with naming(path):
            log = read_log(one_line(path.name), path)
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
    own.sort(key=lambda log: max(log.steps))  # repeated steps as in the later log
    steps = {at: step for log in own for at, step in log.steps.items()}
    loss = sorted((at, of.values[LOSS]) for at, of in steps.items() if LOSS in of.values)
    measured = next(filter(None, (_measured(steps, log) for log in stock)), None)
    for log in stock:
        if measured is None or measured.stock_log != log.name:
            why = "" if measured else ": it has other batches or losses, or no step in common"
            notes.append(
                f"{quoted(log.name)} has no run's number and none of FSEP's metrics, so it is "
                f"stock's; its times are not compared{why if own else ''}."
            )
    return Logs(loss, [log.name for log in own], measured, notes)


def _measured(steps: Mapping[int, Step], stock: LoggedRun) -> Measured | None:
    """Compare the times of two runs of one model on the same data; None for others.

    Speed is steady in the last half.
    """
    numbers = [
        at
        for at, step in sorted(stock.steps.items())
        if at in steps and {LOSS, STEP_MS} <= steps[at].values.keys() & step.values.keys()
    ]
    both = [(steps[at].values, stock.steps[at].values) for at in numbers]
    if not both:
        return None
    mine, theirs = both[0]
    is_same = abs(mine[LOSS] - theirs[LOSS]) <= _SAME_LOSS * abs(theirs[LOSS])
    if not is_same or any(one.get(_SAMPLES) != other.get(_SAMPLES) for one, other in both):
        return None
    later = both[-len(steady(numbers)) :]
    own_ms = statistics.median(one[STEP_MS] for one, _ in later)
    stock_ms = statistics.median(other[STEP_MS] for _, other in later)
    return Measured(stock.name, own_ms, stock_ms, numbers[-len(later)], numbers[-1])
