"""Format of `--fsep-record DIR metrics`, one file per FSEP group: `files.records` of two kinds.

`run` describes a run that starts or resumes at this step, and its planner's cluster as in a
cluster's YAML file, as JSON. `step` has the values that `metrics` names; missing ones are NaN. The
header has the names. The reader is `tools/report/metrics_recording.py`.

Legend: N ranks, L MoE layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files.recording import RecordingFile
from megatron_laer.files.records import MAX_RANKS, OPEN, Field, Format
from megatron_laer.planner.cluster_files import cluster_content
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.telemetry.metrics import LOGGED_NAMES, RECORDED_OF_LAYERS, RECORDED_OF_STEPS

METRICS = Format(
    "megatron_laer-metrics",
    "recording of --fsep-record DIR metrics",
    "metrics",
    dict.fromkeys(("num_ranks", "num_experts", "capacity", "node_size"), MAX_RANKS),
    {
        "run": (Field("text", "<u1", (OPEN,)),),
        "step": (
            Field("of_step", "<f8", ("of_steps",)),
            Field("metrics", "<f8", ("metrics",)),
            Field("of_layers", "<f8", ("of_layers", "layers")),
            Field("rank_tokens_LN", "<i8", ("layers", "num_ranks"), 2**62),
        ),
    },
    {
        "of_steps": RECORDED_OF_STEPS,
        "metrics": LOGGED_NAMES,
        "of_layers": RECORDED_OF_LAYERS,
    },
)


@dataclass(frozen=True)
class Shape:
    """Sizes and layers of a recording, the same when a run is resumed."""

    num_ranks: int
    num_experts: int
    capacity: int
    node_size: int
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        Geometry(self.num_ranks, self.num_experts, self.capacity, self.node_size)


class MetricsWriter(RecordingFile):
    """Writer of a record for each step, on the planner rank.

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
        fields = asdict(shape) | {"layers": [*shape.layers]}
        super().__init__(path, METRICS, fields, first_step, run_number)
        # Written with the first step, so that a run without one leaves nothing.
        self._run: str | None = json.dumps({"run": dict(run), "cluster": cluster_content(cluster)})

    def append(
        self,
        of_step: Mapping[str, float],
        metrics: Mapping[str, float],
        of_layers: Mapping[str, Sequence[float]],
        rank_tokens_LN: Int64,
    ) -> None:
        """Write a step; records of an earlier attempt at it are moved to another file."""
        step = int(of_step["step"])
        self.begin_step(step)
        if self._run is not None:
            text = np.frombuffer(self._run.encode(), dtype=np.uint8)
            self.add("run", step, text=text)
            self._run = None
        self.add(
            "step",
            step,
            of_step=[of_step[name] for name in RECORDED_OF_STEPS],
            metrics=[metrics.get(name, math.nan) for name in LOGGED_NAMES],
            of_layers=[of_layers[name] for name in RECORDED_OF_LAYERS],
            rank_tokens_LN=rank_tokens_LN,
        )
