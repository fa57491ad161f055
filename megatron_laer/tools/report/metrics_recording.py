"""Reader of the recordings of `telemetry.metrics_file`.

Legend: N ranks, L MoE layers, T recorded steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.files.checks import naming, open_input, quoted
from megatron_laer.files.records import Records, json_object
from megatron_laer.planner.cluster_files import cluster_of
from megatron_laer.planner.clusters import Cluster
from megatron_laer.telemetry.metrics import LOGGED_NAMES, RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import METRICS, Shape

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

    @property
    def iterations_T(self) -> Int64:
        """Return the steps as Megatron counts them, from 1."""
        return self.steps_T + 1

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

    def during(self, iterations: range) -> MetricsRecording:
        """Return what is recorded of these iterations."""
        is_in_T = np.isin(self.iterations_T, iterations)
        return MetricsRecording(
            self.shape,
            self.runs,
            self.clusters,
            {name: values_T[is_in_T] for name, values_T in self.of_steps.items()},
            {name: values_TL[is_in_T] for name, values_TL in self.of_layers.items()},
            self.rank_tokens_TLN[is_in_T],
            {name: values_T[is_in_T] for name, values_T in self.metrics.items()},
        )


def read_metrics(path: Path) -> MetricsRecording:
    """Read a group's recording of `--fsep-record DIR metrics`, without an incomplete last record.

    Returns its values by name, of the steps T and layers L: `steps_T`, `of_steps` and `metrics`
    float [T], `of_layers` float [T, L]. Missing ones are NaN. Raises ValueError for damaged content
    and OSError for an unreadable file.
    """
    runs: list[tuple[int, Mapping[str, str]]] = []
    clusters: list[Cluster] = []
    steps: list[dict[str, Any]] = []
    with open_input(path) as file, naming(path):
        records = Records.of(file, path, METRICS)
        try:
            sizes = {name: records.fields[name] for name in METRICS.sizes}
            shape = Shape(**sizes, layers=tuple(records.fields["layers"]))
        except ValueError as error:
            raise ValueError(f"{path}, line 1: {error}") from error
        size = os.fstat(file.fileno()).st_size
        for frame, values in records.read(file, path):
            if frame.kind == "step":
                if not steps:  # before the rest, and as much again for the columns
                    memory.check_enough(2 * size, f"{path} of {size:,} bytes", "give a shorter one")
                steps.append(values)
                continue
            try:
                run, cluster = _run_of(values["text"].tobytes())
            except ValueError as error:
                raise frame.problem(path, error) from error
            runs.append((frame.step, run))
            clusters.append(cluster)
    num_layers, num_ranks = len(shape.layers), shape.num_ranks
    of_steps_TM = _stacked(steps, "of_step", len(RECORDED_OF_STEPS))
    metrics_TM = _stacked(steps, "metrics", len(LOGGED_NAMES))
    of_layers_TML = _stacked(steps, "of_layers", len(RECORDED_OF_LAYERS), num_layers)
    tokens_TLN = _stacked(steps, "rank_tokens_LN", num_layers, num_ranks).astype(np.int64)
    is_there_M = ~np.isnan(metrics_TM).all(axis=0)
    return MetricsRecording(
        shape,
        tuple(runs),
        tuple(clusters),
        dict(zip(RECORDED_OF_STEPS, of_steps_TM.T, strict=True)),
        dict(zip(RECORDED_OF_LAYERS, of_layers_TML.transpose(1, 0, 2), strict=True)),
        tokens_TLN,
        {name: metrics_TM[:, at] for at, name in enumerate(LOGGED_NAMES) if is_there_M[at]},
    )


def _stacked(steps: Sequence[Mapping[str, Any]], name: str, *shape: int) -> np.ndarray[Any, Any]:
    return np.array([step[name] for step in steps]).reshape(len(steps), *shape)


def _run_of(text: bytes) -> tuple[dict[str, str], Cluster]:
    content = json_object(text)
    run = content.get("run")
    if not isinstance(run, dict) or not all(
        isinstance(value, str) and len(name) + len(value) <= _LONGEST_TEXT
        for name, value in run.items()
    ):
        raise ValueError(f"run must hold short texts by name, got {quoted(run)}")
    return run, cluster_of(content.get("cluster"), "cluster")
