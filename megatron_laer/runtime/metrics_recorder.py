"""Recorder of each step's metrics of one FSEP group, on its planner rank.

It waits for no device and makes no collective. A write error ends the recording, not the run. On
other ranks, and in runs without a recording, nothing is opened, and it does nothing.

Legend: N ranks, L MoE layers.
"""

from __future__ import annotations

import logging
import math
import platform
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from megatron_laer.choices import Auto, Restore
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.outcome import PRICES, Outcome, Price, price
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.runtime.planning.planner_rank import naming_flag
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.clock import Clock
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from megatron_laer.telemetry.rank_memory import MemoryUse, memory_use
from megatron_laer.telemetry.statistics import (
    LayerMetrics,
    LayerPasses,
    RankMetrics,
    named,
    priced_values,
)
from megatron_laer.telemetry.step_times import STEP, StepTimes

logger = logging.getLogger(__name__)

_GIB = 2**30
_EXCHANGES = (Kind.DISPATCH, Kind.EXPERTS, Kind.COMBINE)


@dataclass(frozen=True)
class _EndedStep:
    """Step whose times are not known yet."""

    step: int
    layers: Sequence[LayerPasses]
    prices: Sequence[Price | None]
    status: PlannerStatus
    version: int
    received_bytes: int
    verified: int
    memory: MemoryUse


class MetricsRecorder:
    """Writer of the recording that `telemetry/metrics_file` describes."""

    def __init__(self, guard: Guard, device: torch.device, clock: Clock) -> None:
        self._guard = guard
        self._device = device
        self._times = StepTimes(clock)
        self._writer: MetricsWriter | None = None
        self._names: tuple[str, ...] = ()
        self._guards: list[Guard] = []
        self._step = 0
        self._layers: list[LayerPasses] = []
        self._waiting: deque[_EndedStep] = deque()
        self._layer_ms: float | None = None

    @property
    def times(self) -> StepTimes | None:
        """Return the sums of activities' times; None without a recording."""
        return None if self._writer is None else self._times

    def open(
        self, writer: MetricsWriter, names: Sequence[str], unquantised: Collection[int] = ()
    ) -> None:
        """Record these layers, of which some may be without fp8."""
        self._writer, self._names = writer, tuple(names)
        self._guards = [
            self._guard.in_bf16 if layer in unquantised else self._guard
            for layer in range(len(self._names))
        ]

    def begin_step(self, step: int) -> None:
        if self._writer is None:
            return
        self._step = step
        self._layers = [LayerPasses.of(guard.geometry.num_ranks) for guard in self._guards]
        self._times.begin_step()

    def add(self, layer: int, outcome: Outcome) -> None:
        if self._layers:
            self._layers[layer].add(outcome)

    def end_step(
        self, status: PlannerStatus, version: int, received_bytes: int, verified: int
    ) -> None:
        """End a step, and write the steps whose times are known; an error ends the recording."""
        if self._writer is None:
            return
        try:
            self._end_step(status, version, received_bytes, verified)
        except Exception as error:
            self._end_recording(error)

    def _end_step(self, *values: *tuple[PlannerStatus, int, int, int]) -> None:
        self._times.end_step()
        prices = [
            None if layer.last is None else price(guard, layer.last)
            for guard, layer in zip(self._guards, self._layers, strict=True)
        ]
        memory = memory_use(self._device)
        self._waiting.append(_EndedStep(self._step, self._layers, prices, *values, memory))
        self._layers = []
        self._write()

    def take_layer_ms(self) -> float | None:
        """Return the mean time of a layer and microbatch in the newest known step, once."""
        taken, self._layer_ms = self._layer_ms, None
        return taken

    def close(self) -> None:
        if self._waiting:
            try:
                self._times.catch_up()
                self._write()
            except Exception as error:
                self._end_recording(error)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        while self._waiting and (seconds := self._times.take()) is not None:
            step = self._waiting.popleft()
            of_layers = self._of_layers(step, seconds)
            of_step = _of_step(step, seconds)
            measured = [ms for ms in of_layers["layer_ms"] if math.isfinite(ms)]
            self._layer_ms = float(np.mean(measured)) if measured else None
            tokens_LN = np.array([layer.rank_tokens_N for layer in step.layers])
            assert self._writer is not None
            self._writer.append(of_step, self._metrics(step, of_step), of_layers, tokens_LN)

    def _end_recording(self, error: Exception) -> None:
        assert self._writer is not None
        logger.warning("FSEP: the recording of metrics ends at step %d: %s", self._step, error)
        self._writer.close()
        self._writer, self._layer_ms = None, None
        # They would grow with every step of a long run.
        self._layers = []
        self._waiting.clear()
        self._times.forget()

    def _of_layers(
        self, step: _EndedStep, seconds: Mapping[Activity, float]
    ) -> dict[str, Sequence[float]]:
        rows = []
        for name, passes, priced in zip(self._names, step.layers, step.prices, strict=True):
            exchanged_s = sum(
                seconds.get(Activity(kind, name, backward), 0.0)
                for kind in _EXCHANGES
                for backward in (False, True)
            )
            changed_s = seconds.get(Activity(Kind.CHANGE, name, waits=True), 0.0)
            rows.append(
                passes.values()
                | passes.host_values(changed_s, exchanged_s)
                | priced_values([] if priced is None else [priced])
            )
        return {name: [row[name] for row in rows] for name in RECORDED_OF_LAYERS}

    def _metrics(self, step: _EndedStep, of_step: Mapping[str, float]) -> dict[str, float]:
        layers = [
            LayerMetrics() if priced is None else LayerMetrics.of(passes, priced)
            for passes, priced in zip(step.layers, step.prices, strict=True)
        ]
        rank = RankMetrics(
            restore_exposed_ms=of_step["restore_wait_ms"],
            reduce_exposed_ms=of_step["reduce_wait_ms"],
            weight_bytes=step.received_bytes,
            ranks=1.0,
            layer_ms=self._layer_ms or 0.0,
            layer_ranks=0.0 if self._layer_ms is None else 1.0,
        )
        scalars, _ = named(layers, rank)
        headroom_gib = step.memory.headroom_bytes / _GIB
        return scalars | {"fsep_memory_headroom_gib": headroom_gib, "fsep_verified": step.verified}


def metrics_writer(
    config: FSEPConfig,
    guard: Guard,
    priced: Mapping[str, int],
    device: torch.device,
    group: int,
    names: Sequence[str],
    first_step: int,
    run: str | None,
) -> MetricsWriter:
    """Open the file of a group's recording, which has the run's number."""
    folder = str(config.record_metrics)
    with naming_flag("record_metrics", folder):
        of, costs = guard.geometry, guard.costs
        return MetricsWriter(
            METRICS.path(folder, group),
            Shape(of.num_ranks, of.num_experts, of.capacity, of.node_size, tuple(names)),
            run_settings(config, costs, priced, device),
            first_step,
            costs.cluster,
            run,
        )


def run_settings(
    config: FSEPConfig, costs: CostModel, priced: Mapping[str, int], device: torch.device
) -> dict[str, str]:
    """Return the settings that metrics depend on, with all of the cost model except constants."""
    settings: dict[str, Any] = {
        "plan_mode": config.mode,
        "sharding": config.sharding,
        "planner": config.planner,
        "split": config.split,
        "imbalance_tolerance": config.imbalance_tolerance,
        "plan_lag": config.plan_lag,
        "restore": Restore.LAYER if config.kept_gib else config.restore,
        "restore_algorithm": Auto.AUTO if costs.by_layout else costs.restore_algorithm,
        "scheduler": config.scheduler,
        "gemm": config.gemm,
        "cluster": costs.cluster.name,
        "hidden": costs.hidden,
        "ffn": costs.ffn,
        "gated": costs.gated,
        "bytes_per_element": costs.bytes_per_element,
        "precision": costs.precision if costs.precision.is_quantised else None,
        "recompute": costs.recompute,
        "layers": costs.layers,
        "sharers": costs.sharers,
        "combined": costs.is_combined,
        "token_exchange": costs.tokens.dispatch,
        "token_intra_rows": costs.tokens.intra_rows,
        "token_inter_rows": costs.tokens.inter_rows,
        **priced,
        "prices": PRICES,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    for package in ("megatron_laer", "megatron-core", "torch", "numpy"):
        try:
            settings[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source folder
            continue
    return {name: str(value) for name, value in settings.items() if value is not None}


def _of_step(step: _EndedStep, seconds: Mapping[Activity, float]) -> dict[str, float]:
    def total_ms(*kinds: Kind, waits: bool = False) -> float:
        return 1e3 * sum(
            value
            for activity, value in seconds.items()
            if activity.kind in kinds and activity.waits == waits
        )

    return {
        "step": step.step,
        "step_ms": seconds[STEP] * 1e3,
        **{f"{kind}_ms": total_ms(kind) for kind in _EXCHANGES},
        "restore_wait_ms": total_ms(Kind.RESTORE, Kind.CHANGE, waits=True),
        "reduce_wait_ms": total_ms(Kind.REDUCE, waits=True),
        "decide_ms": sum(sum(layer.decide_s) for layer in step.layers) * 1e3,
        "plan_ms": step.status.plan_us / 1e3,
        "version": step.version,
        "late_plans": step.status.late_plans,
        "plan_failures": step.status.failures,
        "used_bytes": step.memory.used_bytes,
        "headroom_bytes": step.memory.headroom_bytes,
        "weight_bytes": step.received_bytes,
    }
