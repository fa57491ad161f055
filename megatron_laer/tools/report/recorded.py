"""A `RunData` from recorded metrics, with the run's trace, layouts and log.

Legend: T steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import lines, naming, open_input
from megatron_laer.planner.layout import ExpertLayout, stock_owner_E
from megatron_laer.runtime.planning.layout_recording import read_layouts
from megatron_laer.telemetry.log import LOSS, read_run
from megatron_laer.telemetry.metrics_file import Shape
from megatron_laer.tools.report.metrics_recording import MetricsRecording
from megatron_laer.tools.report.run_data import RunData, expert_tokens_TLE, shape_settings
from megatron_laer.tools.report.run_files import RunFiles
from megatron_laer.tools.traces.records import Trace


def recorded_run(
    files: RunFiles, recording: MetricsRecording, trace: Trace | None, sharding: Sharding
) -> RunData:
    """Read the rest of a run with recorded metrics.

    Raises ValueError for a damaged line or files of different runs, OSError for unreadable files.
    """
    shape = recording.shape
    if len(recording.steps_T) == 0:
        raise ValueError(f"{files.metrics} holds no step yet; wait for the first one")
    experts_TLE = stock_rank_tokens_TLN = None
    loss = _loss(files.logs)
    notes = [*_notes(files, recording), *_divergence(loss)]
    if trace is not None:
        check_same_run(files.metrics, shape, files.trace, trace)
        experts_TLE = expert_tokens_TLE(
            trace.step_R, trace.layer_R, trace.counts_RNE, recording.steps_T, len(shape.layers)
        )
        stock_rank_tokens_TLN = stock_tokens_TLN(experts_TLE, shape)
    else:
        notes.append("Without --fsep-record DIR trace there are no experts, and no what-if.")
    of_layers = recording.of_layers
    written = datetime.fromtimestamp(files.metrics.stat().st_mtime, UTC)
    return RunData(
        name=files.name,
        shape=shape,
        steps_T=recording.steps_T,
        imbalance_TL=of_layers["max_over_mean"],
        stock_TL=of_layers["stock_max_over_mean"],
        layer_ms_TL=of_layers["layer_ms"] * of_layers["passes"],
        of_steps=recording.of_steps,
        of_layers=of_layers,
        metrics=recording.metrics,
        rank_tokens_TLN=recording.rank_tokens_TLN,
        stock_rank_tokens_TLN=stock_rank_tokens_TLN,
        experts_TLE=experts_TLE,
        layouts=_layouts(files, shape),
        loss=loss,
        resumed=[step for step, _ in recording.runs[1:]],
        recorded=f"recorded until {written:%Y-%m-%d %H:%M} UTC",
        settings=[
            *shape_settings(shape),
            *(recording.runs[-1][1].items() if recording.runs else ()),
        ],
        notes=notes,
        sharding=sharding,
    )


def stock_tokens_TLN(experts_TLE: Int64, shape: Shape) -> Int64:
    owner_E = stock_owner_E(shape.num_ranks, shape.num_experts)
    tokens_TLN = np.zeros((*experts_TLE.shape[:2], shape.num_ranks), dtype=np.int64)
    for expert, rank in enumerate(owner_E.tolist()):
        tokens_TLN[:, :, rank] += experts_TLE[:, :, expert]
    return tokens_TLN


def check_same_run(metrics: Path, shape: Shape, path: Path | None, trace: Trace) -> None:
    """Raise ValueError for a trace whose sizes differ from those of the metrics."""
    of_trace = (trace.num_ranks, trace.num_experts, trace.layers)
    of_metrics = (shape.num_ranks, shape.num_experts, shape.layers)
    if of_trace != of_metrics:
        raise ValueError(
            f"{path} is of {_said(of_trace)}, {metrics} of {_said(of_metrics)}; "
            "they are of different runs, so move one away"
        )


def _said(of: tuple[int, int, tuple[str, ...]]) -> str:
    return f"{of[0]} ranks, {of[1]} experts and {len(of[2])} layers"


def _layouts(files: RunFiles, shape: Shape) -> list[tuple[int, list[ExpertLayout]]]:
    if files.layouts is None:
        return []
    found = list(read_layouts(files.layouts))
    for _, layouts in found:
        sizes = (layouts[0].num_ranks, layouts[0].capacity, layouts[0].num_experts, len(layouts))
        expected = (shape.num_ranks, shape.capacity, shape.num_experts, len(shape.layers))
        if sizes != expected:
            raise ValueError(
                f"{files.layouts} is of (ranks, capacity, experts, layers) = {sizes}, "
                f"{files.metrics} of {expected}; they are of different runs, so move one away"
            )
    return found


def _loss(logs: tuple[Path, ...]) -> list[tuple[int, float]]:
    """Return the losses of the first log that has any."""
    for path in logs:
        with open_input(path) as file, naming(path):
            run = read_run(path.name, (line.decode(errors="replace") for line in lines(file, path)))
        steps = [run.steps[number] for number in sorted(run.steps)]
        found = [(step.number, step.values[LOSS]) for step in steps if LOSS in step.values]
        if found:
            return found
    return []


def _notes(files: RunFiles, recording: MetricsRecording) -> list[str]:
    notes = ["Times are those of the group's planner rank; it waits for the busiest rank."]
    if len(files.groups) > 1:
        notes.append(f"Group {files.group} of the groups {list(files.groups)}.")
    if len(recording.runs) > 1:
        begun = ", ".join(str(step) for step, _ in recording.runs)
        notes.append(f"Written by {len(recording.runs)} runs, which began with the steps {begun}.")
    return notes


def _divergence(loss: list[tuple[int, float]]) -> list[str]:
    iterations = [iteration for iteration, value in loss if not math.isfinite(value)]
    if not iterations:
        return []
    return [
        f"The run diverged: its loss is NaN or infinite in {len(iterations)} of {len(loss)} logged "
        f"iterations, first in iteration {iterations[0]}, which is step {iterations[0] - 1} here."
    ]
