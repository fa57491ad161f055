"""A `RunData` from recorded metrics, with the run's trace, layouts and log.

Legend: T steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import naming
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.planning.layout_recording import read_layouts
from megatron_laer.telemetry.log import LOSS, read_log
from megatron_laer.tools.report.metrics_recording import Float64, MetricsRecording
from megatron_laer.tools.report.run_files import RunFiles
from megatron_laer.tools.traces.records import Trace


@dataclass(frozen=True, eq=False, kw_only=True)
class RunData(MetricsRecording):
    """Metrics of a run, with its other recordings.

    `experts_TLE` is None without a trace. `layouts` are planned ones by their first step, `loss` by
    iteration from 1. `recorded` is the time of the last step, as text.
    """

    name: str
    experts_TLE: Int64 | None
    layouts: Sequence[tuple[int, Sequence[ExpertLayout]]]
    loss: Sequence[tuple[int, float]]
    recorded: str
    notes: Sequence[str]
    sharding: Sharding

    @property
    def imbalance_TL(self) -> Float64:
        """Return the tokens of the busiest rank over the mean."""
        return self.of_layers["max_over_mean"]

    @property
    def stock_TL(self) -> Float64:
        """Return the tokens of stock's busiest rank over the mean."""
        return self.of_layers["stock_max_over_mean"]

    @property
    def layer_ms_TL(self) -> Float64:
        """Return the time over all passes of a step."""
        return self.of_layers["layer_ms"] * self.of_layers["passes"]

    @property
    def resumed(self) -> list[int]:
        """Return the first steps of later runs that went on with the recording."""
        return [step for step, _ in self.runs[1:]]

    @property
    def geometry(self) -> Geometry:
        shape = self.shape
        sizes = shape.num_ranks, shape.num_experts, shape.capacity, shape.node_size
        return Geometry(*sizes, self.sharding)

    @property
    def settings(self) -> list[tuple[str, str]]:
        shape = self.shape
        return [
            ("ranks N", str(shape.num_ranks)),
            ("ranks per node G", str(shape.node_size)),
            ("experts E", str(shape.num_experts)),
            ("slots per rank C", str(shape.capacity)),
            ("MoE layers", str(len(shape.layers))),
            *(self.runs[-1][1].items() if self.runs else ()),
        ]


def recorded_run(
    files: RunFiles, recording: MetricsRecording, trace: Trace | None, sharding: Sharding
) -> RunData:
    """Read the rest of a run with recorded metrics.

    Raises ValueError for a damaged recording, OSError for unreadable files.
    """
    if len(recording.steps_T) == 0:
        raise ValueError(f"{files.metrics} holds no step yet; wait for the first one")
    loss, experts_TLE = _loss(files.logs), None
    notes = [*_notes(files, recording, loss)]
    if trace is not None:
        experts_TLE = _expert_tokens_TLE(trace, recording.steps_T)
    else:
        notes.append("Without --fsep-record DIR trace there are no experts, and no what-if.")
    written = datetime.fromtimestamp(files.metrics.stat().st_mtime, UTC)
    return RunData(
        **vars(recording),
        name=files.name,
        experts_TLE=experts_TLE,
        layouts=[] if files.layouts is None else list(read_layouts(files.layouts)),
        loss=loss,
        recorded=f"recorded until {written:%Y-%m-%d %H:%M} UTC",
        notes=notes,
        sharding=sharding,
    )


def _expert_tokens_TLE(trace: Trace, steps_T: Int64) -> Int64:
    """Add up a trace's tokens of each expert by layer and step, for the ordered steps `steps_T`."""
    tokens_RE = trace.counts_RNE.sum(axis=1, dtype=np.int64)
    is_known_R = np.isin(trace.step_R, steps_T)
    at_R = np.searchsorted(steps_T, trace.step_R[is_known_R])
    experts_TLE = np.zeros((len(steps_T), len(trace.layers), trace.num_experts), dtype=np.int64)
    np.add.at(experts_TLE, (at_R, trace.layer_R[is_known_R]), tokens_RE[is_known_R])
    return experts_TLE


def _loss(logs: tuple[Path, ...]) -> list[tuple[int, float]]:
    """Return the losses of the first log that has any."""
    for path in logs:
        with naming(path):
            steps = read_log(path.name, path).steps
        values = [(number, steps[number].values) for number in sorted(steps)]
        if found := [(number, of[LOSS]) for number, of in values if LOSS in of]:
            return found
    return []


def _notes(
    files: RunFiles, recording: MetricsRecording, loss: Sequence[tuple[int, float]]
) -> Iterator[str]:
    yield "Times are those of the group's planner rank; it waits for the busiest rank."
    if len(files.groups) > 1:
        yield f"Group {files.group} of the groups {list(files.groups)}."
    if len(recording.runs) > 1:
        begun = ", ".join(str(step) for step, _ in recording.runs)
        yield f"Written by {len(recording.runs)} runs, which began with the steps {begun}."
    if lost := [iteration for iteration, value in loss if not math.isfinite(value)]:
        yield (
            f"The run diverged: its loss is NaN or infinite in {len(lost)} of {len(loss)} logged "
            f"iterations, first in iteration {lost[0]}, which is step {lost[0] - 1} here."
        )
