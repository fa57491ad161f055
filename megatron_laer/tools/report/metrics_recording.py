"""Reader of the recordings of `telemetry.metrics_file`.

Legend: N ranks, L MoE layers, T recorded steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.files.checks import MAX_LINE, MAX_TEXT_BYTES, open_input, quoted
from megatron_laer.files.json_lines import numbered_lines
from megatron_laer.planner.cluster_files import cluster_of
from megatron_laer.planner.clusters import Cluster
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import MAX_STEP, Shape, read_shape, read_step

_LARGEST = 1e18
_LONGEST_TEXT = 1000

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MetricsRecording:
    """Content of a recording by name, float [T] and [T, L]; missing values are NaN.

    `runs` has the first step and description of each run that wrote it, and `clusters` its
    planner's cluster, with the run's GEMMs. `metrics` are the logged ones, of this group.
    """

    shape: Shape
    runs: tuple[tuple[int, Mapping[str, str]], ...]
    clusters: tuple[Cluster, ...]
    of_steps: Mapping[str, Float64]
    of_layers: Mapping[str, Float64]
    rank_tokens_TLN: Int64
    metrics: Mapping[str, Float64]

    @property
    def steps_T(self) -> Int64:
        steps_T: Int64 = self.of_steps["step"].astype(np.int64)
        return steps_T


@dataclass(frozen=True)
class _RecordedStep:
    of_step: dict[str, float]
    metrics: dict[str, float]
    of_layers: Float64
    rank_tokens_LN: Int64


def read_metrics(path: Path) -> MetricsRecording:
    """Read a recording of `MetricsWriter`; an incomplete last line is skipped with a warning."""
    runs: list[tuple[int, Mapping[str, str]]] = []
    clusters: list[Cluster] = []
    steps: list[_RecordedStep] = []
    with open_input(path) as file:
        if not file.readline(MAX_TEXT_BYTES + 1).endswith(b"\n") and file.tell() <= MAX_TEXT_BYTES:
            raise ValueError(f"{path} holds no whole line; it is no recording of metrics")
        file.seek(0)
        lines = numbered_lines(file, path, MAX_LINE)
        shape, seed = read_shape(next(lines)[2], path)
        last = -1
        for number, _, line in lines:
            content = read_step(line, path, number, seed)
            try:
                if "run" in content:
                    runs.append((content["step"], _run_of(content["run"])))
                    clusters.append(cluster_of(content.get("cluster"), "cluster"))
                    continue
                steps.append(_step_of(content, shape))
                if content["step"] <= last:
                    raise ValueError(f"step {content['step']} is not above {last}")
                if last < 0:
                    _check_memory(path, len(line), shape)
                last = content["step"]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    num_layers = len(shape.layers)
    names = dict.fromkeys(name for step in steps for name in step.metrics)
    shape_ML = len(RECORDED_OF_LAYERS), num_layers
    layers_TML = _column([step.of_layers for step in steps]).reshape(-1, *shape_ML)
    tokens_TLN = np.array([step.rank_tokens_LN for step in steps], dtype=np.int64)
    return MetricsRecording(
        shape,
        tuple(runs),
        tuple(clusters),
        {name: _column([step.of_step[name] for step in steps]) for name in RECORDED_OF_STEPS},
        {name: layers_TML[:, at] for at, name in enumerate(RECORDED_OF_LAYERS)},
        tokens_TLN.reshape(len(steps), num_layers, shape.num_ranks),
        {name: _column([step.metrics.get(name, math.nan) for step in steps]) for name in names},
    )


def _run_of(run: Any) -> dict[str, str]:
    if not isinstance(run, dict) or not all(
        isinstance(value, str) and len(name) + len(value) <= _LONGEST_TEXT
        for name, value in run.items()
    ):
        raise ValueError(f"run must hold short texts by name, got {quoted(run)}")
    return run


def _step_of(content: Mapping[str, Any], shape: Shape) -> _RecordedStep:
    expected = {*RECORDED_OF_STEPS, "metrics", "layers", "rank_tokens"}
    if wrong := sorted(expected ^ content.keys()):
        raise ValueError(f"lacks, or has beyond what is expected, {quoted(wrong)}")
    layers, metrics, tokens = content["layers"], content["metrics"], content["rank_tokens"]
    num_layers = len(shape.layers)
    if not isinstance(layers, dict) or layers.keys() != {*RECORDED_OF_LAYERS}:
        names = list(RECORDED_OF_LAYERS)
        raise ValueError(f"layers holds {quoted(layers)}, expected lists of {names}")
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics must hold numbers by name, got {quoted(metrics)}")
    for name in RECORDED_OF_LAYERS:
        if not _is_list(layers[name], num_layers):
            raise ValueError(f"{name} must have a number for each of {num_layers} layers")
    if not _is_list(tokens, num_layers) or not all(
        _is_list(row, shape.num_ranks)
        and all(type(value) is int and 0 <= value <= MAX_STEP for value in row)
        for row in tokens
    ):
        raise ValueError(f"rank_tokens must be {num_layers} lists of {shape.num_ranks} tokens")
    return _RecordedStep(
        {name: _number(content[name], name) for name in RECORDED_OF_STEPS},
        {name: _number(value, name) for name, value in metrics.items()},
        _column([[_number(value, name) for value in layers[name]] for name in RECORDED_OF_LAYERS]),
        np.array(tokens, dtype=np.int64),
    )


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _number(value: object, name: str) -> float:
    if value is None:
        return math.nan
    # This form also refuses NaN and infinity, which Python's JSON reads.
    if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number or null, got {quoted(value)}")
    return float(value)  # type: ignore[arg-type]


def _check_memory(path: Path, line_bytes: int, shape: Shape) -> None:
    """Refuse a file that would not fit into memory, estimated from its first step's length."""
    steps = path.stat().st_size // max(1, line_bytes) + 1
    cells = len(shape.layers) * (shape.num_ranks + 2 * len(RECORDED_OF_LAYERS))
    memory.check_enough(32 * steps * cells, f"{path} with some {steps} steps", "give a shorter one")


def _column(values: Sequence[Any]) -> Float64:
    return np.array(values, dtype=np.float64)
