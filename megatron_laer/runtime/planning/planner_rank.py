"""Planner and recordings of an FSEP group, on its rank 0.

The other ranks wait for it in the next collective, so nothing raises once training runs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from megatron_laer.config import FSEPConfig, LatePlan, lays_out_freely, setting
from megatron_laer.files.checks import quoted
from megatron_laer.files.recording import new_run, run_of
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import WINDOW, SmoothedForecast, WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder, home_digest
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import ServiceState
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, LayoutRecorder
from megatron_laer.runtime.planning.mailbox import RoutingMailbox
from megatron_laer.runtime.planning.planned_layouts import PlannedLayouts
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE, TraceWriter

logger = logging.getLogger(__name__)


class PlannerRank:
    """Planner and recordings of one FSEP group."""

    def __init__(
        self,
        config: FSEPConfig,
        geometry: Geometry,
        costs: CostModel,
        layers: Sequence[str],
        layouts: Sequence[ExpertLayout],
        homes: Sequence[HomeOrder],
        *,
        group_index: int,
        first_step: int,
        resumed: PlannerState | None,
        unquantised: Collection[int] = (),
        run: str | None = None,
    ) -> None:
        self._faults = 0
        self._source: PlannedLayouts | None = None
        self._recorder: LayoutRecorder | None = None
        trace: TraceWriter | None = None
        signature: dict[str, Any] = {
            "split": config.split.value,
            "plan_mode": config.mode.value,
            "imbalance_tolerance": config.imbalance_tolerance,
        }
        if home_digest(homes):
            signature["homes"] = [home.expert_E.tolist() for home in homes]
        window = WINDOW if lays_out_freely(config.planner) else 0
        with ExitStack() as opened:
            if config.makes_plans:
                self._source = PlannedLayouts(
                    _strategies(config, geometry, costs, len(layers), unquantised),
                    layouts,
                    lag=config.plan_lag,
                    wait=config.late_plan == LatePlan.WAIT,
                    on_warning=_warn,
                    forecast=WindowForecast() if window else SmoothedForecast(),
                    resumed=resumed,
                    check_layout=geometry.check_layout,
                )
                opened.callback(self._source.close)
            if (folder := config.record_layouts) is not None:
                path = LAYOUTS.path(folder, group_index)
                with naming_flag("record_layouts", folder):
                    of_run = signature, layers, first_step, run
                    self._recorder = LayoutRecorder(path, geometry, *of_run)
                opened.callback(self._recorder.close)
            if (folder := config.record_trace) is not None:
                path = TRACE.path(folder, group_index)
                with naming_flag("record_trace", folder):
                    sizes = geometry.num_ranks, geometry.num_experts
                    trace = TraceWriter(path, *sizes, layers, first_step, run)
            observe = None if self._source is None else self._source.observe
            self.mailbox = RoutingMailbox(layers, homes, observe, trace, _warn, window)
            opened.pop_all()  # all are open; `close` closes them

    @property
    def status(self) -> PlannerStatus:
        source = self._source
        if source is None:
            return PlannerStatus()
        failures = source.failures + self._faults + self.mailbox.faults
        return PlannerStatus(round(source.plan_ms * 1e3), source.late_plans, failures)

    def planned(self) -> ServiceState | None:
        return None if self._source is None else self._source.state()

    def due(self, step: int) -> list[ExpertLayout] | None:
        if self._recorder is not None:
            try:
                self._recorder.begin_step(step)
            except (OSError, ValueError) as error:
                self._end_recording(step, error)
        if self._source is None:
            return None
        try:
            return self._source.due(step)
        except Exception as error:
            self._faults += 1
            _warn(f"no layouts for step {step}, they stay as they are: {error!r}")
            return None

    def applied(self, step: int, layouts: list[ExpertLayout]) -> None:
        if self._recorder is not None:
            try:
                self._recorder.record(step, layouts)
            except (OSError, ValueError) as error:
                self._end_recording(step, error)

    def close(self) -> None:
        for part in (self._source, self._recorder, self.mailbox):
            if part is not None:
                part.close()

    def _end_recording(self, step: int, error: Exception) -> None:
        _warn(f"the recording of layouts ends before step {step}: {error}")
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


def _strategies(
    config: FSEPConfig,
    geometry: Geometry,
    costs: CostModel,
    num_layers: int,
    unquantised: Collection[int],
) -> dict[int, Strategy]:
    make = partial(make_strategy, config.planner, geometry=geometry)
    usual, others = make(costs=costs), make(costs=costs.in_bf16)
    return {layer: others if layer in unquantised else usual for layer in range(num_layers)}


def run_of_group(config: FSEPConfig, group_index: int) -> str:
    """Return the number in the recordings that the group's run continues, or a new one."""
    kinds = (
        (LAYOUTS, config.record_layouts),
        (TRACE, config.record_trace),
        (METRICS, config.record_metrics),
    )
    paths = [format.path(folder, group_index) for format, folder in kinds if folder]
    return next(filter(None, map(run_of, paths)), None) or new_run()


@contextmanager
def naming_flag(field_name: str, folder: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting(field_name, quoted(folder))}: {error}") from error


def _warn(message: str) -> None:
    logger.warning("FSEP: %s", message)
