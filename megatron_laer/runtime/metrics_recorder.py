"""The metrics recorder writes each step's metrics of one FSEP group, on its planner rank.

It measures beside the training: it waits for no device, makes no collective, and a file that can no
longer be written ends the recording, not the run.

Legend: N ranks, L MoE layers.
"""

from __future__ import annotations

import logging
import math
import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch

from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.prediction import Prediction, predict
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.runtime.metrics import LayerMetrics, RankMetrics, named
from megatron_laer.telemetry.clock import Clock
from megatron_laer.telemetry.layer_passes import LayerPasses, mean, predicted_values
from megatron_laer.telemetry.memory import MemoryUse, memory_use
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS
from megatron_laer.telemetry.metrics_file import MetricsWriter, Shape, recording_path
from megatron_laer.telemetry.step_times import StepTimes

logger = logging.getLogger(__name__)

_GIB = 2**30
_EXCHANGES = ("dispatch", "experts", "combine")


@dataclass
class _Layer:
    """Collects what a step's passes of one layer were, and how long they were decided on."""

    passes: LayerPasses
    decide_s: list[float] = field(default_factory=list)
    taken_cost_s: float = 0.0
    taken_decide_s: float = 0.0
    last: Decision | None = None

    def add(self, decision: Decision, decide_s: float) -> None:
        """Add a pass."""
        self.passes.add(decision)
        self.decide_s.append(decide_s)
        if decision.replanned:
            self.taken_decide_s += decide_s
            self.taken_cost_s += math.nan if decision.cost_s is None else decision.cost_s
        self.last = decision


@dataclass(frozen=True)
class _Step:
    """Holds a step whose times are not known yet."""

    step: int
    layers: Sequence[_Layer]
    predictions: Sequence[Prediction | None]
    status: PlannerStatus
    version: int
    memory: MemoryUse


class MetricsRecorder:
    """Collects and writes; see `telemetry/metrics_file`.

    Args:
        names: of the group's layers, by index.
        clock: that waits and exchanges are measured with.

    Attributes:
        times: hears of the rank's intervals.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        guard: Guard,
        names: Sequence[str],
        device: torch.device,
        clock: Clock,
    ) -> None:
        self.times = StepTimes(clock)
        self._writer: MetricsWriter | None = writer
        self._guard = guard
        self._names = tuple(names)
        self._device = device
        self._step = 0
        self._layers: list[_Layer] = []
        self._waiting: deque[_Step] = deque()
        self._layer_ms: float | None = None

    def begin_step(self, step: int) -> None:
        """Begin a step."""
        if self._writer is None:
            return
        self._step = step
        num_ranks = self._guard.geometry.num_ranks
        self._layers = [_Layer(LayerPasses.none_of(num_ranks)) for _ in self._names]
        self.times.begin_step()

    def add(self, layer: int, decision: Decision, decide_s: float) -> None:
        """Add a routed pass of a layer, by index."""
        if self._layers:
            self._layers[layer].add(decision, decide_s)

    def end_step(self, status: PlannerStatus, version: int) -> None:
        """End a step, and write those whose times are known by now.

        Whatever goes wrong ends the recording: other ranks are waiting for this one.
        """
        if self._writer is None:
            return
        try:
            self._end_step(status, version)
        except Exception as error:
            self._end_recording(error)

    def _end_step(self, status: PlannerStatus, version: int) -> None:
        self.times.end_step()
        predictions = [
            None if layer.last is None else predict(self._guard, layer.last)
            for layer in self._layers
        ]
        memory = memory_use(self._device)
        self._waiting.append(_Step(self._step, self._layers, predictions, status, version, memory))
        self._layers = []
        self._write()

    def take_layer_ms(self) -> float | None:
        """Return the mean time of a layer and microbatch in the newest step that is known, once."""
        taken, self._layer_ms = self._layer_ms, None
        return taken

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._waiting:
            try:
                self.times.catch_up()
                self._write()
            except Exception as error:
                self._end_recording(error)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        while self._waiting and (seconds := self.times.take()) is not None:
            step = self._waiting.popleft()
            of_layers = self._of_layers(step, seconds)
            of_step = _of_step(step, seconds)
            measured = [ms for ms in of_layers["layer_ms"] if math.isfinite(ms)]
            self._layer_ms = float(np.mean(measured)) if measured else None
            tokens_LN = np.array([layer.passes.rank_tokens_N for layer in step.layers])
            assert self._writer is not None
            self._writer.append(of_step, self._metrics(step, of_step), of_layers, tokens_LN)

    def _end_recording(self, error: Exception) -> None:
        assert self._writer is not None
        logger.warning("FSEP: the recording of metrics ends at step %d: %s", self._step, error)
        self._writer.close()
        self._writer, self._layer_ms = None, None
        # Nobody takes these any more, and a long run would add to them in every step.
        self._layers = []
        self._waiting.clear()
        self.times.forget()

    def _of_layers(self, step: _Step, seconds: Mapping[str, float]) -> dict[str, Sequence[float]]:
        rows = []
        for name, layer, predicted in zip(self._names, step.layers, step.predictions, strict=True):
            of_layer = sum(
                seconds.get(f"{kind} {name}{direction}", 0.0)
                for kind in _EXCHANGES
                for direction in ("", ", backward")
            )
            waits_s = seconds.get(f"wait: change {name}", 0.0)
            passes = layer.passes
            measured = {
                "decide_ms": mean(layer.decide_s) * 1e3,
                "taken_cost_ms": layer.taken_cost_s * 1e3 if passes.fresh else math.nan,
                "change_ms": (waits_s + layer.taken_decide_s) * 1e3 if passes.fresh else math.nan,
                "layer_ms": of_layer * 1e3 / passes.number if passes.number else math.nan,
            }
            predictions = [] if predicted is None else [predicted]
            rows.append(passes.values() | measured | predicted_values(predictions))
        return {metric.name: [row[metric.name] for row in rows] for metric in RECORDED_OF_LAYERS}

    def _metrics(self, step: _Step, of_step: Mapping[str, float]) -> dict[str, float]:
        """Name the metrics of this group and step as they are logged."""
        layers = [
            LayerMetrics()
            if predicted is None
            else LayerMetrics(
                imbalance=mean(layer.passes.ratios),
                stock_imbalance=mean(layer.passes.stock_ratios),
                fresh_layouts=layer.passes.fresh / layer.passes.number,
                decide_ms=mean(layer.decide_s) * 1e3,
                predicted_ms=predicted.layer_s * 1e3,
                balanced_ms=predicted.balanced_s * 1e3,
                bound_ms=predicted.bound_s * 1e3,
                groups=1.0,
            )
            for layer, predicted in zip(step.layers, step.predictions, strict=True)
        ]
        rank = RankMetrics(
            restore_exposed_ms=of_step["restore_wait_ms"],
            reduce_exposed_ms=of_step["reduce_wait_ms"],
            ranks=1.0,
            layer_ms=self._layer_ms or 0.0,
            layer_ranks=0.0 if self._layer_ms is None else 1.0,
        )
        scalars, _ = named(layers, rank)
        return scalars | {"fsep_memory_headroom_gib": step.memory.headroom_bytes / _GIB}


def open_recorder(
    config: FSEPConfig,
    guard: Guard,
    priced: Mapping[str, int],
    names: Sequence[str],
    group_index: int,
    first_step: int,
    device: torch.device,
    clock: Clock,
) -> MetricsRecorder:
    """Open the recording of one FSEP group in the folder of `--fsep-record-metrics`.

    Args:
        priced: the routing by which tokens are priced.

    Raises:
        ValueError: a recording that cannot be continued, or that another run writes.
        OSError: one that cannot be written.
    """
    assert config.record_metrics is not None
    path = recording_path(config.record_metrics, group_index)
    run = run_settings(config, guard.costs, priced, device)
    cluster = guard.costs.cluster
    writer = MetricsWriter(path, _shape_of(guard, names), run, first_step, cluster)
    return MetricsRecorder(writer, guard, names, device, clock)


def _shape_of(guard: Guard, names: Sequence[str]) -> Shape:
    """Say what a recording is of."""
    geometry = guard.geometry
    return Shape(
        geometry.num_ranks,
        geometry.num_experts,
        geometry.capacity,
        geometry.node_size,
        tuple(names),
    )


def run_settings(
    config: FSEPConfig, costs: CostModel, priced: Mapping[str, int], device: torch.device
) -> dict[str, str]:
    """Say how a run began: what its metrics depend on, as texts by name.

    Every field of the cost model but the cluster's constants is there.
    """
    settings: dict[str, Any] = {
        "plan_mode": config.mode,
        "planner": config.planner,
        "split": config.split,
        "imbalance_tolerance": config.imbalance_tolerance,
        "plan_lag": config.plan_lag,
        "restore": config.restore,
        "restore_algorithm": costs.restore_algorithm,
        "scheduler": config.scheduler,
        "gemm": config.gemm,
        "cluster": costs.cluster.name,
        "hidden": costs.hidden,
        "ffn": costs.ffn,
        "gated": costs.gated,
        "bytes_per_element": costs.bytes_per_element,
        "recompute": costs.recompute,
        "token_exchange": costs.tokens.exchange,
        "token_intra_rows": costs.tokens.intra_rows,
        "token_inter_rows": costs.tokens.inter_rows,
        **priced,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    for package in ("megatron_laer", "megatron-core", "torch", "numpy"):
        try:
            settings[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a folder
            continue
    return {name: str(value) for name, value in settings.items() if value is not None}


def _of_step(step: _Step, seconds: Mapping[str, float]) -> dict[str, float]:
    def total_ms(chosen: Callable[[str], bool]) -> float:
        return sum(value for label, value in seconds.items() if chosen(label)) * 1e3

    return {
        "step": step.step,
        "step_ms": seconds[""] * 1e3,
        **{f"{kind}_ms": total_ms(_starts(f"{kind} ")) for kind in _EXCHANGES},
        "restore_wait_ms": total_ms(_starts("wait: restore ", "wait: change ")),
        "reduce_wait_ms": total_ms(_starts("wait: reduce ")),
        "decide_ms": sum(sum(layer.decide_s) for layer in step.layers) * 1e3,
        "plan_ms": step.status.plan_us / 1e3,
        "version": step.version,
        "late_plans": step.status.late_plans,
        "plan_failures": step.status.failures,
        "used_bytes": step.memory.used_bytes,
        "headroom_bytes": step.memory.headroom_bytes,
    }


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda label: label.startswith(prefixes)
