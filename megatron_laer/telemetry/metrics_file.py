"""Format of `--fsep-record-metrics`: JSON lines, one file per FSEP group.

    {"format":"megatron_laer-metrics","version":2,"num_ranks":N,...,"layers":[...],"crc":...}\\n
    {"step":7,"run":{"plan_mode":"adaptive",...},"cluster":{"name":...,"gemm":...},"crc":...}\\n
    {"step":7,"step_ms":...,"metrics":{...},"layers":{"max_over_mean":[...L],...},
     "rank_tokens":[[...N],...L],"crc":...}\\n

A `run` line describes a run that starts or resumes at this step, and its planner's cluster as in a
cluster's YAML file. `metrics` describes the names. Numbers of a step have four digits; `null` is a
missing value. `files/json_lines.py` defines the checksum, which version 1 lacks. Imports neither
torch nor Megatron, so that reports need neither.

Legend: N ranks, L MoE layers, T recorded steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.files.checks import MAX_LINE, MAX_TEXT_BYTES, open_input, quoted
from megatron_laer.files.json_lines import (
    VERSION,
    check_shape,
    headers,
    numbered_lines,
    read_header,
    read_line,
    sealed,
    warn_of,
)
from megatron_laer.files.recording import RecordingFile
from megatron_laer.planner.cluster_files import cluster_content, cluster_of
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS

logger = logging.getLogger(__name__)

FORMAT = "megatron_laer-metrics"

_OF_STEPS = tuple(metric.name for metric in RECORDED_OF_STEPS)
_OF_LAYERS = tuple(metric.name for metric in RECORDED_OF_LAYERS)
_SIZES = ("num_ranks", "num_experts", "capacity", "node_size")
_MAX_SIZE, _MAX_STEP, _LARGEST = 2**20, 2**53, 1e18
_LONGEST_TEXT = 1000

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes and layers of a recording, the same when a run is resumed."""

    num_ranks: int
    num_experts: int
    capacity: int
    node_size: int
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        check_shape({name: (getattr(self, name), _MAX_SIZE) for name in _SIZES}, [*self.layers])
        Geometry(self.num_ranks, self.num_experts, self.capacity, self.node_size)


@dataclass(frozen=True)
class MetricsRecording:
    """Content of a recording; missing values are NaN.

    Attributes:
        runs: first step of each run that wrote it, and its description.
        clusters: each of these runs' planner cluster, with the run's GEMMs; None if unknown.
        of_steps: float [T] by name.
        of_layers: float [T, L] by name.
        metrics: float [T] by name: the logged metrics, of this group.
    """

    shape: Shape
    runs: tuple[tuple[int, Mapping[str, str]], ...]
    clusters: tuple[Cluster | None, ...]
    of_steps: Mapping[str, Float64]
    of_layers: Mapping[str, Float64]
    rank_tokens_TLN: Int64
    metrics: Mapping[str, Float64]

    @property
    def steps_T(self) -> Int64:
        steps_T: Int64 = self.of_steps["step"].astype(np.int64)
        return steps_T


class MetricsWriter:
    """Writer of a line for each step, on the planner rank.

    Args:
        run: description of this run, texts by name.
        first_step: of this run; 0 if it does not resume another.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        run: Mapping[str, str],
        first_step: int,
        cluster: Cluster | None = None,
    ) -> None:
        self._file = RecordingFile(path, *headers(FORMAT, asdict(shape)), _recorded, first_step)
        # Written with the first step, so that a run without one leaves nothing.
        constants = {} if cluster is None else {"cluster": cluster_content(cluster)}
        self._run = sealed({"step": first_step, "run": dict(run), **constants})

    def append(
        self,
        of_step: Mapping[str, float],
        metrics: Mapping[str, float],
        of_layers: Mapping[str, Sequence[float]],
        rank_tokens_LN: Int64,
    ) -> None:
        """Write a step; records of an earlier attempt at it are moved to another file."""
        step = int(of_step["step"])
        self._file.begin_step(step)
        line = {
            **{name: _short(of_step[name]) for name in _OF_STEPS},
            "step": step,
            "metrics": {name: _short(value) for name, value in metrics.items()},
            "layers": {name: [*map(_short, of_layers[name])] for name in _OF_LAYERS},
            "rank_tokens": rank_tokens_LN.tolist(),
        }
        self._file.append(self._run + sealed(line))
        self._run = b""

    def close(self) -> None:
        self._file.close()


def recording_path(directory: str | Path, group_index: int) -> Path:
    """Return the file of one FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"metrics-{group_index}.jsonl"


def read_metrics(path: Path) -> MetricsRecording:
    """Read a recording of `MetricsWriter`; an incomplete last line is skipped with a warning."""
    runs: list[tuple[int, Mapping[str, str]]] = []
    clusters: list[Cluster | None] = []
    steps: list[_RecordedStep] = []
    with open_input(path) as file:
        if not file.readline(MAX_TEXT_BYTES + 1).endswith(b"\n") and file.tell() <= MAX_TEXT_BYTES:
            raise ValueError(f"{path} holds no whole line; it is no recording of metrics")
        file.seek(0)
        lines = numbered_lines(file, path, MAX_LINE)
        first = next(lines)
        shape, version = _read_header(first[2], path)
        warn_of(version, path)
        for number, _, line in lines:
            content = _parsed(line, path, number, version)
            try:
                if "run" in content:
                    runs.append((content["step"], _run_of(content)))
                    found = content.get("cluster")
                    clusters.append(None if found is None else cluster_of(found, "cluster"))
                else:
                    steps.append(_step_of(content, shape))
                    if len(steps) > 1 and steps[-2].step >= steps[-1].step:
                        raise ValueError(f"step {steps[-1].step} is not above {steps[-2].step}")
                    if len(steps) == 1:
                        _check_memory(path, len(line), shape)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    names = dict.fromkeys(name for step in steps for name in step.metrics)
    return MetricsRecording(
        shape,
        tuple(runs),
        tuple(clusters),
        {name: _column([step.of_step[name] for step in steps]) for name in _OF_STEPS},
        {
            name: _column([step.of_layers[at] for step in steps]).reshape(-1, len(shape.layers))
            for at, name in enumerate(_OF_LAYERS)
        },
        np.array([step.rank_tokens_LN for step in steps], dtype=np.int64).reshape(
            len(steps), len(shape.layers), shape.num_ranks
        ),
        {name: _column([step.metrics.get(name, math.nan) for step in steps]) for name in names},
    )


@dataclass(frozen=True)
class _RecordedStep:
    step: int
    of_step: dict[str, float]
    metrics: dict[str, float]
    of_layers: Float64
    rank_tokens_LN: Int64


def _recorded(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the step of every whole line but the first, and the offset of its end."""
    with open_input(path) as file:
        version = VERSION
        for number, end, line in numbered_lines(file, path, MAX_LINE):
            if number == 1:
                _, version = _read_header(line, path)
            else:
                yield _parsed(line, path, number, version)["step"], end


def _read_header(line: bytes, path: Path) -> tuple[Shape, int]:
    try:
        header, version = read_header(line, FORMAT, "recording of metrics")
        expected = {*_SIZES, "layers"}
        if set(header) != expected:
            raise ValueError(f"has the keys {quoted(sorted(header))}, expected {sorted(expected)}")
        check_shape({}, header["layers"])
        return Shape(**header | {"layers": tuple(header["layers"])}), version
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error


def _parsed(line: bytes, path: Path, number: int, version: int) -> dict[str, Any]:
    try:
        content = read_line(line, version)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    step = content.get("step")
    if type(step) is not int or not 0 <= step <= _MAX_STEP:
        raise ValueError(f"{path}, line {number}: step {quoted(step)} is no step")
    return content


def _run_of(content: Mapping[str, Any]) -> dict[str, str]:
    run = content["run"]
    if not isinstance(run, dict) or not all(
        isinstance(value, str) and len(name) + len(value) <= _LONGEST_TEXT
        for name, value in run.items()
    ):
        raise ValueError(f"run must hold short texts by name, got {quoted(run)}")
    return run


def _step_of(content: Mapping[str, Any], shape: Shape) -> _RecordedStep:
    expected = {*_OF_STEPS, "metrics", "layers", "rank_tokens"}
    if set(content) != expected:
        wrong = sorted(expected ^ set(content))
        raise ValueError(f"lacks, or has beyond what is expected, {quoted(wrong)}")
    layers, num_layers = content["layers"], len(shape.layers)
    if not isinstance(layers, dict) or set(layers) != set(_OF_LAYERS):
        raise ValueError(f"layers holds {quoted(layers)}, expected lists of {list(_OF_LAYERS)}")
    if not isinstance(content["metrics"], dict):
        raise ValueError(f"metrics must hold numbers by name, got {quoted(content['metrics'])}")
    rows = []
    for name in _OF_LAYERS:
        if not isinstance(layers[name], list) or len(layers[name]) != num_layers:
            raise ValueError(f"{name} must have a number for each of {num_layers} layers")
        rows.append([_number(value, name) for value in layers[name]])
    tokens = content["rank_tokens"]
    is_shaped = isinstance(tokens, list) and len(tokens) == num_layers
    if not is_shaped or not all(
        isinstance(row, list)
        and len(row) == shape.num_ranks
        and all(type(value) is int and 0 <= value <= _MAX_STEP for value in row)
        for row in tokens
    ):
        raise ValueError(f"rank_tokens must be {num_layers} lists of {shape.num_ranks} tokens")
    return _RecordedStep(
        content["step"],
        {name: _number(content[name], name) for name in _OF_STEPS},
        {name: _number(value, name) for name, value in content["metrics"].items()},
        np.array(rows, dtype=np.float64),
        np.array(tokens, dtype=np.int64),
    )


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
    cells = len(shape.layers) * (shape.num_ranks + 2 * len(_OF_LAYERS))
    memory.check_enough(32 * steps * cells, f"{path} with some {steps} steps", "give a shorter one")


def _column(values: Sequence[Any]) -> Float64:
    return np.array(values, dtype=np.float64)


def _short(value: float) -> float | int | None:
    """Round a number to four digits; return None for inf and nan, which JSON does not have."""
    if not math.isfinite(value):
        return None
    if value == int(value):
        return int(value)
    return float(f"{value:.4g}")
