"""Recordings of small runs, written by a planner rank's recorder with a fake clock."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode, Sharding
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.outcome import Outcome
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.runtime.metrics_recorder import MetricsRecorder
from megatron_laer.runtime.planning.layout_recording import LayoutRecorder
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.costs import COSTS

GEOMETRY = Geometry(num_ranks=4, num_experts=8, capacity=3, node_size=2)
LAYERS = ("layer 1", "layer 2")
STEPS, MICROBATCHES = 5, 2
# A cluster of a user's own file, ten times slower than the default.
OWN = replace(
    COSTS.cluster.with_constants({"intra.bytes_per_s": 1e10, "inter.bytes_per_s": 1e9}),
    name="my-machine",
)
GUARD = Guard(PlanMode.ADAPTIVE, COSTS, GEOMETRY)
RUN = {
    "plan_mode": "adaptive",
    "sharding": "rows",
    "cluster": COSTS.cluster.name,
    "hidden": "4096",
    "ffn": "14336",
    "gated": "True",
    "bytes_per_element": "2",
    "restore_algorithm": "flat",
    "recompute": "none",
    "token_exchange": "rank",
    "top_k": "2",
}
SIGNATURE = {"split": "exact", "plan_mode": "adaptive", "imbalance_tolerance": None}
RUN_NUMBER = "0123456789abcdef"
# Enough for a fresh layout to pay.
TOKENS = 60_000
TICK_MS = 2.0
# By the planner rank, times the step.
RECEIVED_BYTES = 3 * 2**20


class TickingClock:
    """Clock that advances by a tick at every reading."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def now(self) -> float:
        return next(self._ticks) * TICK_MS * 1e-3

    def passed(self, timestamp: Any) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def catch_up(self) -> None:
        return None


def counts_NE(step: int, layer: int, microbatch: int) -> Int64:
    luck = np.random.default_rng((step, layer, microbatch))
    shares_E = np.random.default_rng(layer).gamma(0.4, size=GEOMETRY.num_experts) + 0.02
    return luck.multinomial(TOKENS, shares_E / shares_E.sum(), size=GEOMETRY.num_ranks)


def record_run(
    folder: Path,
    steps: int = STEPS,
    *,
    layers: tuple[str, ...] = LAYERS,
    run: dict[str, str] | None = None,
    has_trace: bool = True,
    cluster: Cluster = COSTS.cluster,
    number: str = RUN_NUMBER,
) -> None:
    """Write a run's metrics, layouts and, by default, its trace into a folder.

    Experts are at home if `run` says so.
    """
    run = RUN if run is None else run
    geometry = replace(GEOMETRY, sharding=Sharding(run.get("sharding", Sharding.ROWS)))
    guard = Guard(PlanMode(run.get("plan_mode", PlanMode.ADAPTIVE)), COSTS, geometry)
    shape = Shape(4, 8, 3, 2, layers)
    writer = MetricsWriter(METRICS.path(folder, 0), shape, run, 0, cluster, number)
    recorder = MetricsRecorder(guard, torch.device("cpu"), TickingClock())
    recorder.open(writer, layers)
    times = recorder.times
    assert times is not None
    of_run = layers, 0, number
    layouts = LayoutRecorder(folder / "group-0.layouts", geometry, SIGNATURE, *of_run)
    trace = TraceWriter(folder / "group-0.trace", 4, 8, *of_run) if has_trace else None
    for step in range(steps):
        recorder.begin_step(step)
        layout = geometry.random_layout((step,)) if step else geometry.static_layout
        planned = [layout] * len(layers)
        if step:
            layouts.record(step, planned)
        for microbatch in range(MICROBATCHES):
            for layer, name in enumerate(layers):
                counts = counts_NE(step, layer, microbatch)
                decision = guard.decide(counts, planned[layer])
                recorder.add(layer, Outcome(decision, 1e-3))
                times.begin_exchange(Activity(Kind.DISPATCH, name))
                times.end_exchange(Activity(Kind.EXPERTS, name))
                times.begin_exchange(Activity(Kind.COMBINE, name))
                times.end_exchange(Activity(Kind.DENSE))
                if trace is not None:
                    trace.append(step, layer, microbatch, counts)
        recorder.end_step(PlannerStatus(plan_us=500), step, RECEIVED_BYTES * step, 3 * step)
    recorder.close()
    layouts.close()
    if trace is not None:
        trace.close()
