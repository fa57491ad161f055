"""Format of `--fsep-record DIR metrics`: JSON lines, one file per FSEP group.

    {"format":"megatron_laer-metrics","version":2,"run":...,"num_ranks":N,...,"layers":[...],
     "crc":...}\\n
    {"record":1,"step":7,"run":{"plan_mode":"adaptive",...},"cluster":{"name":...,"gemm":...},
     "crc":...}\\n
    {"record":2,"step":7,"step_ms":...,"metrics":{...},"layers":{"max_over_mean":[...L],...},
     "rank_tokens":[[...N],...L],"crc":...}\\n

A `run` line describes a run that starts or resumes at this step, and its planner's cluster as in a
cluster's YAML file. `metrics` describes the names. Numbers of a step have four digits; `null` is a
missing value. `files/json_lines.py` defines the checksum, `files/recording.py` the number of the
run. The reader is `tools/report/metrics_recording.py`.

Legend: N ranks, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laer.arrays import Int64
from megatron_laer.files.checks import MAX_LINE, open_input, quoted
from megatron_laer.files.json_lines import MAX_RANKS, check_shape, numbered_lines
from megatron_laer.files.recording import RecordingFile, read_record, read_recording_header
from megatron_laer.planner.cluster_files import cluster_content
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS

FORMAT = "megatron_laer-metrics"

_SIZES = ("num_ranks", "num_experts", "capacity", "node_size")
MAX_STEP = 2**53


@dataclass(frozen=True)
class Shape:
    """Sizes and layers of a recording, the same when a run is resumed."""

    num_ranks: int
    num_experts: int
    capacity: int
    node_size: int
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        check_shape({name: (getattr(self, name), MAX_RANKS) for name in _SIZES}, [*self.layers])
        Geometry(self.num_ranks, self.num_experts, self.capacity, self.node_size)


class MetricsWriter:
    """Writer of a line for each step, on the planner rank.

    `run` describes this run by name; `first_step` is 0 if it does not resume another.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        run: Mapping[str, str],
        first_step: int,
        cluster: Cluster,
        run_number: str | None = None,
    ) -> None:
        self._file = RecordingFile(path, FORMAT, asdict(shape), _recorded, first_step, run_number)
        # Written with the first step, so that a run without one leaves nothing.
        description = {"run": dict(run), "cluster": cluster_content(cluster)}
        self._run: dict[str, Any] | None = {"step": first_step, **description}

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
            **{name: _short(of_step[name]) for name in RECORDED_OF_STEPS},
            "step": step,
            "metrics": {name: _short(value) for name, value in metrics.items()},
            "layers": {name: [*map(_short, of_layers[name])] for name in RECORDED_OF_LAYERS},
            "rank_tokens": rank_tokens_LN.tolist(),
        }
        if self._run is not None:
            self._file.append_line(self._run)
            self._run = None
        self._file.append_line(line)

    def close(self) -> None:
        self._file.close()


def recording_path(directory: str | Path, group_index: int) -> Path:
    """Return the file of one FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"metrics-{group_index}.jsonl"


def _recorded(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the step of every whole line but the first, and the offset of its end."""
    with open_input(path) as file:
        lines = numbered_lines(file, path, MAX_LINE)
        _, seed = read_shape(next(lines)[2], path)
        for number, end, line in lines:
            yield read_step(line, path, number, seed)["step"], end


def read_shape(line: bytes, path: Path) -> tuple[Shape, int]:
    try:
        header, seed = read_recording_header(line, FORMAT, "recording of metrics")
        expected = {*_SIZES, "layers"}
        if set(header) != expected:
            raise ValueError(f"has the keys {quoted(sorted(header))}, expected {sorted(expected)}")
        check_shape({}, header["layers"])
        return Shape(**header | {"layers": tuple(header["layers"])}), seed
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error


def read_step(line: bytes, path: Path, number: int, seed: int) -> dict[str, Any]:
    try:
        content = read_record(line, path, number, seed)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    step = content.get("step")
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError(f"{path}, line {number}: step {quoted(step)} is no step")
    return content


def _short(value: float) -> float | int | None:
    """Round a number to four digits; return None for inf and nan, which JSON does not have."""
    if not math.isfinite(value):
        return None
    if value == int(value):
        return int(value)
    return float(f"{value:.4g}")
