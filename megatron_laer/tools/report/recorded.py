"""A `RunData` from recorded metrics, with the run's trace, layouts and log.

Legend: T steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import quoted
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, read_layouts
from megatron_laer.telemetry.trace_file import TRACE
from megatron_laer.tools.report.logs import Logs, read_logs
from megatron_laer.tools.report.metrics_recording import MetricsRecording
from megatron_laer.tools.report.run_files import RunFiles, lacks, ranges
from megatron_laer.tools.traces.records import Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class RunData(MetricsRecording):
    """Metrics of a run, with its other recordings.

    `experts_TLE` is None without a trace, and `traced` are the trace's steps. `layouts` are planned
    ones by their first step, or None where they are lost. `logs` are those next to the recording.
    `recorded` is the time of the last step, as text.
    """

    name: str
    experts_TLE: Int64 | None
    traced: Sequence[int]
    layouts: Sequence[tuple[int, Sequence[ExpertLayout] | None]]
    logs: Logs
    recorded: str
    notes: Sequence[str]
    sharding: Sharding

    @property
    def resumed(self) -> list[int]:
        """Return the first iterations of later runs that went on with the recording."""
        return [step + 1 for step, _ in self.runs[1:]]

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
    logs = read_logs(files, recording)
    experts_TLE, traced = None, list[int]()
    lacking = list[str]()
    if trace is not None:
        assert files.trace is not None
        experts_TLE = _expert_tokens_TLE(trace, recording.steps_T)
        steps, numbers = (of.tolist() for of in np.unique(trace.step_R, return_counts=True))
        traced, microbatches = steps, dict(zip(steps, numbers, strict=True))
        passes_T = recording.of_layers["passes"].sum(axis=1)
        passes = dict(zip(recording.steps_T.tolist(), passes_T.tolist(), strict=True))
        lacking += lacks(files.metrics, passes, files.trace, microbatches)
    layouts = [] if files.layouts is None else list(read_layouts(files.layouts))
    lost = _changes(recording) - {step for step, _ in layouts} if files.layouts else set[int]()
    if lost:
        text = f"{quoted(str(files.layouts))} lacks the layouts of the {ranges(lost)}, where "
        lacking.append(f"{text}{quoted(files.metrics.name)} has a change of layouts")
    for lack in lacking:
        logger.warning("%s", lack)
    written = datetime.fromtimestamp(files.metrics.stat().st_mtime, UTC)
    return RunData(
        **vars(recording),
        name=files.name,
        experts_TLE=experts_TLE,
        traced=traced,
        layouts=sorted([*layouts, *((step, None) for step in lost)], key=lambda of: of[0]),
        logs=logs,
        recorded=f"recorded until {written:%Y-%m-%d %H:%M} UTC",
        notes=[*_notes(files, recording, logs), *(f"{lack}." for lack in lacking)],
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


def _changes(recording: MetricsRecording) -> set[int]:
    """Return the steps with other layouts than the step before, if that was recorded too."""
    is_next_T = np.diff(recording.steps_T) == 1
    is_changed_T = is_next_T & (np.diff(recording.of_steps["version"]) > 0)
    return set(recording.steps_T[1:][is_changed_T].tolist())


def _notes(files: RunFiles, recording: MetricsRecording, logs: Logs) -> Iterator[str]:
    yield "Times are those of the group's planner rank; it waits for the busiest rank."
    if len(files.groups) > 1:
        yield f"Group {files.group} of the groups {list(files.groups)}."
    if len(recording.runs) > 1:
        begun = ", ".join(str(step + 1) for step, _ in recording.runs)
        yield f"Written by {len(recording.runs)} runs, which began with the iterations {begun}."
    if lost := [iteration for iteration, value in logs.loss if not math.isfinite(value)]:
        number = f"{len(lost)} of {len(logs.loss)}"
        yield (
            f"The run diverged: its loss is NaN or infinite in {number} logged iterations, first "
            f"in iteration {lost[0]}."
        )
    yield from logs.notes
    for format, file, without in (
        (TRACE, files.trace, "no experts, and no what-if"),
        (LAYOUTS, files.layouts, "no slots of experts"),
    ):
        suffix, others = f".{format.suffix}", files.of_other_groups
        there = ", ".join(quoted(path.name) for path in others if path.suffix == suffix)
        if file is None:
            yield (
                f"There is no {quoted(format.path('', files.group).name)}, which --fsep-record DIR "
                f"{format.suffix} writes: {without}"
                f"{f'; {there} is of another group' if there else ''}."
            )
