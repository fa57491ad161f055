"""Readers of a run's results: Megatron's log, and the metrics that FSEP recorded."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laer.telemetry import log
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools.report.metrics_recording import read_metrics


@dataclass(frozen=True)
class Measured:
    """Measurements of a whole run, one entry per step.

    `imbalance` is max/mean tokens per rank as computed; empty for stock.
    """

    losses: list[float]
    step_s: list[float]
    imbalance: list[float]

    def seconds(self, skipped: int) -> float:
        """Return the mean step time without the first `skipped` steps."""
        return statistics.fmean(self.step_s[skipped:])

    def balance(self, skipped: int) -> float | None:
        return statistics.fmean(self.imbalance[skipped:]) if self.imbalance else None


@dataclass(frozen=True)
class Profile:
    """Seconds of a step by kind on the planner rank; max/mean tokens per rank, also by layer L."""

    tokens_s: float
    experts_s: float
    exposed_s: float
    step_s: float
    max_over_mean: float
    stock_max_over_mean: float
    max_over_mean_L: list[float]

    @property
    def kinds(self) -> tuple[float, float, float]:
        """Return seconds of tokens, of experts and of the whole step."""
        return self.tokens_s, self.experts_s, self.step_s


def read_log(path: Path, steps: int) -> Measured:
    """Read the log of a run of `steps` steps; raise ValueError if it is missing or lacks steps."""
    if not path.is_file():
        raise ValueError(f"{path.stem}: no log at {path}")
    run = log.read_log(path.stem, path)
    if [*sorted(run.steps)] != [*range(1, steps + 1)]:
        raise ValueError(f"{path.stem}: {len(run.steps)} of {steps} steps; its log is {path}")
    values = [run.steps[step].values for step in range(1, steps + 1)]

    def column(name: str) -> list[float]:
        return [of_step[name] for of_step in values if name in of_step]

    if not len(column(log.LOSS)) == len(column(log.STEP_MS)) == steps:
        raise ValueError(f"{path.stem}: steps without a loss or a time; its log is {path}")
    return Measured(
        losses=column(log.LOSS),
        step_s=[time_ms / 1e3 for time_ms in column(log.STEP_MS)],
        imbalance=column(log.IMBALANCE),
    )


def read_profile(folder: Path, skipped: int) -> Profile:
    """Return means of a run's recorded metrics, without the first `skipped` steps.

    Raises ValueError or OSError without a recording or a later step.
    """
    recording = read_metrics(METRICS.path(folder, 0))
    later_T = recording.steps_T >= skipped
    if not later_T.any():
        raise ValueError(f"{folder} has no step after the first {skipped}")

    def seconds(*names: str) -> float:
        return sum(_mean(recording.of_steps, name, later_T) for name in names) / 1e3

    return Profile(
        tokens_s=seconds("dispatch_ms", "combine_ms"),
        experts_s=seconds("experts_ms"),
        exposed_s=seconds("restore_wait_ms", "reduce_wait_ms"),
        step_s=seconds("step_ms"),
        max_over_mean=_mean(recording.of_layers, "max_over_mean", later_T),
        stock_max_over_mean=_mean(recording.of_layers, "stock_max_over_mean", later_T),
        max_over_mean_L=np.nanmean(recording.of_layers["max_over_mean"][later_T], axis=0).tolist(),
    )


def _mean(columns: Mapping[str, np.ndarray], name: str, later_T: np.ndarray) -> float:
    return float(np.nanmean(columns[name][later_T]))
