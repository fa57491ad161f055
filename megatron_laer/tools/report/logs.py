"""Megatron's logs next to a run's recordings: which are the run's own, and which are stock's.

A log's lines have no number of the run. But each has the time of the newest plan in microseconds,
and a layer's time. The run's recording has both, and two runs hardly share them. Stock's lines have
none of FSEP's metrics.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_laer.files.checks import naming, one_line, quoted
from megatron_laer.telemetry.log import LOSS, STEP_MS, LoggedRun, read_log, steady
from megatron_laer.tools.report.metrics_recording import MetricsRecording, read_metrics

_PLAN_MS, _LAYER_MS = "fsep_plan_ms", "fsep_layer_ms"
# The device may be some steps behind the host. A log has its newest known time.
_STEPS_BEHIND = 8
# Half a unit of a logged number's last digit.
_ROUNDING = 5.1e-4
# The first losses of stock and FSEP differ by rounding, those of other models or data by more.
_SAME_LOSS = 0.01
_SAMPLES = "consumed samples"
# A resumed run repeats steps, of which the recording has the later times alone.
_LEAST_AGREEING = 0.2


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


def read_logs(
    paths: Sequence[Path], recording: MetricsRecording, other_groups: Sequence[Path]
) -> Logs:
    """Read the logs next to a recording, of which those of other runs are not used.

    A line is printed by one rank, with the plans of its group: perhaps one of `other_groups`,
    whose metrics are given.
    """
    own, unmarked, stock, notes = list[LoggedRun](), list[LoggedRun](), list[LoggedRun](), []
    for path in paths:
        if not path.is_file():
            notes.append(f"{quoted(path.name)} is no regular file, and is not read.")
            continue
        with naming(path):
            log = read_log(one_line(path.name), path)
        if not log.steps:
            continue
        names = {name for step in log.steps.values() for name in step.values}
        if STEP_MS in names and not any(name.startswith("fsep_") for name in names):
            stock.append(log)
            continue
        agreeing, compared = _agreeing(log, recording)
        for metrics in other_groups if compared else ():
            if agreeing > _LEAST_AGREEING * compared:
                break
            agreeing, compared = max((agreeing, compared), _agreeing(log, read_metrics(metrics)))
        if not compared:
            unmarked.append(log)
        elif agreeing > _LEAST_AGREEING * compared:
            own.append(log)
        else:
            notes.append(
                f"{quoted(path.name)} is the log of another run, and is not used: its times of "
                f"plans and layers differ in {compared - agreeing} of {compared} steps."
            )
    own.sort(key=lambda log: max(log.steps))  # repeated steps as in the later log
    shown = [log for log in own or unmarked[:1] if _losses(log)]
    if shown and not own:
        notes.append(
            f"{quoted(shown[0].name)} has no metric by which to know its run; its loss is drawn."
        )
    loss = {at: of for log in shown for at, of in _losses(log).items()}
    measured = next(filter(None, (_measured(own, log) for log in stock)), None)
    for log in stock:
        if measured is None or measured.stock_log != log.name:
            why = "" if measured else ": it has other batches or losses, or no step in common"
            notes.append(
                f"{quoted(log.name)} has none of FSEP's metrics, so it is stock's; its loss is not "
                f"drawn, and its times are not compared{why if own else ''}."
            )
    return Logs(sorted(loss.items()), [log.name for log in shown], measured, notes)


def _losses(log: LoggedRun) -> dict[int, float]:
    return {at: step.values[LOSS] for at, step in log.steps.items() if LOSS in step.values}


def _agreeing(log: LoggedRun, recording: MetricsRecording) -> tuple[int, int]:
    """Return the number of steps whose times agree, and of those compared."""
    at_step = {step: at for at, step in enumerate(recording.steps_T.tolist())}
    plan_ms_T = recording.of_steps["plan_ms"]
    layer_ms_T = recording.metrics.get(_LAYER_MS)
    agreeing = compared = 0
    for number, step in log.steps.items():
        # Megatron's log counts iterations from 1.
        if (at := at_step.get(number - 1)) is None:
            continue
        plan_ms, layer_ms = (step.values.get(name, 0.0) for name in (_PLAN_MS, _LAYER_MS))
        newest = slice(max(0, at - _STEPS_BEHIND), at + 1)
        is_plans = plan_ms > 0 and abs(plan_ms_T[at] - plan_ms) < _ROUNDING
        is_layers = (
            layer_ms > 0
            and layer_ms_T is not None
            and bool((abs(layer_ms_T[newest] - layer_ms) < _ROUNDING).any())
        )
        agreeing += is_plans or is_layers
        compared += plan_ms > 0 or layer_ms > 0
    return int(agreeing), compared


def _measured(own: Sequence[LoggedRun], stock: LoggedRun) -> Measured | None:
    """Compare the times of two runs of one model on the same data; None for others.

    Speed is steady in the last half.
    """
    steps = {at: step for log in own for at, step in log.steps.items()}
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
