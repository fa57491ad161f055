"""Planner and recordings of an FSEP group, on its rank 0.

The other ranks wait for it in the next collective, so nothing raises once training runs.

Legend: N ranks, E experts, M microbatches, L layers, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import LatePlan
from megatron_laer.config import FSEPConfig, flag_name
from megatron_laer.files.checks import quoted
from megatron_laer.files.recording import RecordingFile, new_run, run_of
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import WINDOW, Forecast, SmoothedForecast, WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder, home_digest
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService, ServiceState
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.rules import lays_out_freely
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, LayoutRecorder
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE, TraceWriter

logger = logging.getLogger(__name__)


class PlannerRank:
    """Planner and recordings of one FSEP group, and the counts on their way to both."""

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
        self._layers = layers
        self._homes = homes
        self._faults = 0
        self._service: PlannerService | None = None
        self._recordings: dict[str, RecordingFile] = {}
        self._step = 0
        self._num_microbatches: int | None = None
        # The paper's forecast has the counts of the last microbatches, and any other their sum.
        self._window = WINDOW if lays_out_freely(config.planner) else 0
        # By layer: the sum alone, or the microbatches of the window.
        self._newest_MNE: dict[int, list[Int64]] = {}
        signature: dict[str, Any] = {
            "split": config.split.value,
            "plan_mode": config.mode.value,
            "imbalance_tolerance": config.imbalance_tolerance,
        }
        if home_digest(homes):
            signature["homes"] = [home.expert_E.tolist() for home in homes]
        with ExitStack() as opened:
            if config.makes_plans:
                first: Forecast = WindowForecast() if self._window else SmoothedForecast()
                saved: Sequence[Forecast] = resumed.forecasts if resumed else [first] * len(layers)
                self._service = PlannerService(
                    _strategies(config, geometry, costs, len(layers), unquantised),
                    layouts,
                    [known if type(known) is type(first) else first for known in saved],
                    lag=config.plan_lag,
                    waits=config.late_plan == LatePlan.WAIT,
                    on_warning=_warn,
                    plans=resumed.plans if resumed else (),
                    check_layout=geometry.check_layout,
                )
                opened.callback(self._service.close)
            if (folder := config.record_layouts) is not None:
                path = LAYOUTS.path(folder, group_index)
                with naming_flag("record_layouts", folder):
                    of_run = signature, layers, first_step, run
                    self._recordings["layouts"] = LayoutRecorder(path, geometry, *of_run)
                opened.callback(self._recordings["layouts"].close)
            if (folder := config.record_trace) is not None:
                path = TRACE.path(folder, group_index)
                with naming_flag("record_trace", folder):
                    sizes = geometry.num_ranks, geometry.num_experts
                    trace = TraceWriter(path, *sizes, layers, first_step, run)
                    self._recordings["routing"] = trace
            opened.pop_all()  # all are open; `close` closes them

    @property
    def status(self) -> PlannerStatus:
        of = self._service
        if of is None:
            return PlannerStatus()
        return PlannerStatus(round(of.plan_ms * 1e3), of.late_plans, of.failures + self._faults)

    def planned(self) -> ServiceState | None:
        return None if self._service is None else self._service.state()

    def begin_step(self, step: int, num_microbatches: int | None) -> None:
        self._step, self._num_microbatches = step, num_microbatches
        self._newest_MNE.clear()

    def put(self, layer: int, microbatch: int, counts_NE: Int64) -> None:
        """Record a microbatch's counts; a layer's last ones of the step start its planning."""
        if "routing" in self._recordings:
            by_expert_NE = self._homes[layer].by_expert(counts_NE)
            self._record("routing", TraceWriter.append, self._step, layer, microbatch, by_expert_NE)
        if self._service is None:
            return
        before_MNE = self._newest_MNE.get(layer, []) if microbatch else []
        if self._window or not before_MNE:
            self._newest_MNE[layer] = [*before_MNE, counts_NE.copy()][-self._window :]
        else:
            self._newest_MNE[layer] = [before_MNE[0] + counts_NE]
        if microbatch + 1 == self._num_microbatches:
            self._submit(layer)

    def put_pairs(self, pairs_LEE: Int64, chosen_LTE: Bool) -> None:
        """Record the step's pairs and sampled sets of each layer, of home positions."""
        for layer, pairs_EE in enumerate(pairs_LEE):
            by_expert_EE = self._homes[layer].pairs_by_expert(pairs_EE)
            self._record("routing", TraceWriter.append_pairs, self._step, layer, by_expert_EE)
        for layer, chosen_TE in enumerate(chosen_LTE):
            is_token_T = chosen_TE.any(axis=1)
            if is_token_T.any():
                its_TE = self._homes[layer].by_expert(chosen_TE[is_token_T])
                self._record("routing", TraceWriter.append_sets, self._step, layer, its_TE)

    def end_step(self) -> None:
        """Plan from the counts of a step whose number of microbatches was unknown."""
        if self._num_microbatches is None:
            for layer in list(self._newest_MNE):
                self._submit(layer)

    def due(self, step: int) -> Sequence[ExpertLayout] | None:
        self._record("layouts", LayoutRecorder.begin_step, step)
        if self._service is None:
            return None
        try:
            return self._service.due(step)
        except Exception as error:
            self._faults += 1
            _warn(f"no layouts for step {step}, they stay as they are: {error!r}")
            return None

    def applied(self, step: int, layouts: Sequence[ExpertLayout]) -> None:
        self._record("layouts", LayoutRecorder.record, step, layouts)

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
        for recording in self._recordings.values():
            recording.close()

    def _submit(self, layer: int) -> None:
        assert self._service is not None
        newest_MNE = self._newest_MNE[layer]
        counts = np.stack(newest_MNE) if self._window else newest_MNE[0]
        try:
            self._service.submit(self._step, layer, counts)
        except Exception as error:
            self._faults += 1
            _warn(
                f"the routing of step {self._step}, {self._layers[layer]} is not planned from: "
                f"{error!r}"
            )

    def _record(self, name: str, write: Callable[..., None], step: int, *values: Any) -> None:
        """Write to a recording, if there is one; it ends at the first error."""
        if (recording := self._recordings.get(name)) is None:
            return
        try:
            write(recording, step, *values)
        except (OSError, ValueError) as error:
            _warn(f"the recording of {name} ends at step {step}: {error}")
            self._recordings.pop(name).close()


def _strategies(
    config: FSEPConfig,
    geometry: Geometry,
    costs: CostModel,
    num_layers: int,
    unquantised: Collection[int],
) -> list[Strategy]:
    make = partial(make_strategy, config.planner, geometry=geometry)
    usual, others = make(costs=costs), make(costs=costs.in_bf16)
    return [others if layer in unquantised else usual for layer in range(num_layers)]


def run_of_group(
    config: FSEPConfig, group_index: int, first_step: int, saved: str | None = None
) -> str:
    """Return the number in the recordings that the run resumes, else the saved one, or a new one.

    `saved` is that of the planner's state.
    """
    kinds = (
        (LAYOUTS, config.record_layouts),
        (TRACE, config.record_trace),
        (METRICS, config.record_metrics),
    )
    paths = [format.path(folder, group_index) for format, folder in kinds if folder and first_step]
    return next(filter(None, map(run_of, paths)), saved if first_step else None) or new_run()


@contextmanager
def naming_flag(field_name: str, folder: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        flag, _, what = flag_name(field_name).split()
        raise ValueError(f"{flag} {quoted(folder)} {what}: {error}") from error


def _warn(message: str) -> None:
    logger.warning("FSEP: %s", message)
