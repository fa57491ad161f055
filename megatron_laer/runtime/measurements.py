"""Measurements of a rank: on a planner rank the recording of metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from megatron_laer.config import FSEPConfig
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.outcome import Outcome
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.metrics_recorder import MetricsRecorder, run_settings
from megatron_laer.runtime.planning.planner_rank import naming_flag
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from megatron_laer.telemetry.step_times import StepTimes


class Measurements:
    """Measurements of one rank; none before `start`.

    A planner rank that records metrics has a `recorder` of each step's metrics, for which
    `step_times` adds up activities.
    """

    def __init__(
        self,
        config: FSEPConfig,
        groups: FSEPGroups,
        guard: Guard,
        streams: ExchangeStreams,
        priced: Mapping[str, int],
    ) -> None:
        self.step_times: StepTimes | None = None
        self.recorder: MetricsRecorder | None = None
        self._config = config
        self._groups = groups
        self._guard = guard
        self._streams = streams
        self._priced = priced

    def start(
        self,
        layers: Sequence[str],
        first_step: int,
        device: torch.device,
        unquantised: Collection[int],
        run: str | None,
    ) -> None:
        """Open the recording, which has the run's number, on the planner rank."""
        config, groups = self._config, self._groups
        if config.record_metrics is not None and groups.rank == 0 and layers:
            with naming_flag("record_metrics", config.record_metrics):
                of, costs = self._guard.geometry, self._guard.costs
                writer = MetricsWriter(
                    METRICS.path(config.record_metrics, groups.index),
                    Shape(of.num_ranks, of.num_experts, of.capacity, of.node_size, tuple(layers)),
                    run_settings(config, costs, self._priced, device),
                    first_step,
                    costs.cluster,
                    run,
                )
                clock = self._streams.parameters.times.clock
                self.recorder = MetricsRecorder(
                    writer, self._guard, layers, device, clock, unquantised
                )
                self.step_times = self.recorder.times
                for stream in (self._streams.parameters, self._streams.gradients):
                    stream.times.step_times = self.step_times

    def begin_step(self, step: int) -> None:
        if self.recorder is not None:
            self.recorder.begin_step(step)

    def add(self, layer: int, outcome: Outcome) -> None:
        if self.recorder is not None:
            self.recorder.add(layer, outcome)

    def end_step(self, status: PlannerStatus, version: int, received_bytes: int) -> None:
        if self.recorder is not None:
            self.recorder.end_step(status, version, received_bytes)

    def take_layer_ms(self) -> float | None:
        return None if self.recorder is None else self.recorder.take_layer_ms()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
