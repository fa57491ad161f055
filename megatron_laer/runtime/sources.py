"""Where the layouts of a step come from, on rank 0 of the FSEP group: a planner or a recording.

Sources take part in no collective; the coordinator tells the other ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.service import Plan, PlannerService
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.strategies import Strategy

# A planner that takes longer than this under `wait` is not waited for again: the run goes on with
# the layouts in force, as under `keep`.
WAIT_TIMEOUT_S = 120.0

# How long saving a checkpoint waits for plans in the making under `keep`.
SETTLE_TIMEOUT_S = 1.0

# How a run uses its layouts, by the names of settings; part of a recording's header.
Regime = Mapping[str, Any]


class LayoutSource(Protocol):
    """Counts in, layouts of a step out; one per FSEP group, on its rank 0."""

    plan_ms: float
    late_plans: int
    failures: int

    def observe(self, step: int, layer: int, counts_NE: npt.NDArray[np.int64]) -> None:
        """The routing of a whole step in one layer (index)."""

    def due(self, step: int) -> list[ExpertLayout] | None:
        """Layouts that take effect with `step`, one per layer, or None for nothing new."""

    def close(self) -> None:
        """Stop."""


class PlannedLayouts:
    """Layouts made by a strategy in a background thread.

    Args:
        lag: a plan from the counts of step t takes effect at step t + lag.
        wait: wait for the plan that is due, instead of keeping the layouts in force; until one does
            not come in time.
        resumed: an earlier run's state to go on with; it fits these layers.
    """

    def __init__(
        self,
        strategy: Strategy,
        initial: Sequence[ExpertLayout],
        *,
        lag: int,
        wait: bool,
        on_warning: Callable[[str], None],
        resumed: PlannerState | None = None,
    ) -> None:
        self._lag = lag
        self._wait = wait
        self._on_warning = on_warning
        self._layers = range(len(initial))
        plans = resumed.plans if resumed else ()
        self._observed = {plan.source_step: set(self._layers) for plan in plans}
        self._service = PlannerService(
            strategy,
            self._layers,
            dict(enumerate(initial)),
            on_warning,
            lossless=wait,
            forecast=dict(enumerate(resumed.forecasts)) if resumed else SmoothedForecast(),
            plans=plans,
        )
        self.plan_ms = 0.0
        self.late_plans = 0

    @property
    def failures(self) -> int:
        """Layers whose planning failed and that kept their layout."""
        return self._service.failures

    def observe(self, step: int, layer: int, counts_NE: npt.NDArray[np.int64]) -> None:
        """Queue for planning; never waits."""
        self._observed.setdefault(step, set()).add(layer)
        self._service.submit(step, layer, counts_NE)

    def due(self, step: int) -> list[ExpertLayout] | None:
        """The plan from the counts of step - lag, or under `keep` the newest one before it."""
        source_step = step - self._lag
        is_expected = len(self._observed.get(source_step, ())) == len(self._layers)
        if not self._wait:
            plan = self._service.ready(source_step)
        elif not is_expected:
            plan = None
        else:
            plan = self._service.wait(source_step, WAIT_TIMEOUT_S)
            if plan is None:
                self._stop_waiting()
        if is_expected and (plan is None or plan.source_step != source_step):
            self.late_plans += 1
        self._observed = {at: seen for at, seen in self._observed.items() if at > source_step}
        if plan is None:
            return None
        self.plan_ms = plan.plan_ms
        return [plan.layouts[layer] for layer in self._layers]

    def state(self) -> tuple[tuple[SmoothedForecast, ...], tuple[Plan, ...]]:
        """Forecasts of the layers, and plans that are not in force yet, oldest first.

        Waits for plans in the making: under `wait` as long as a step would, else a moment.
        """
        timeout_s = WAIT_TIMEOUT_S if self._wait else SETTLE_TIMEOUT_S
        forecasts, plans, settled = self._service.state(timeout_s)
        if self._wait and not settled:
            self._stop_waiting()
        return tuple(forecasts[layer] for layer in self._layers), tuple(plans)

    def close(self) -> None:
        """Stop the planner's thread; a strategy that does not return is left behind."""
        self._service.close(timeout_s=1.0)

    def _stop_waiting(self) -> None:
        """A planner that hangs must cost its time once, and not at every step and checkpoint."""
        self._wait = False
        self._service.drop_late_steps()
        self._on_warning(
            "from here on late plans are not waited for, as with --fsep-late-plan keep"
        )


class ReplayedLayouts:
    """Layouts that an earlier run recorded with `LayoutRecorder`."""

    plan_ms = 0.0
    late_plans = 0
    failures = 0

    def __init__(
        self, path: Path, geometry: Geometry, regime: Regime, layers: Sequence[str]
    ) -> None:
        """Read and check the whole recording.

        Raises:
            ValueError: a missing or malformed file, or one of another shape, quoting the line.
        """
        self._layouts = _read_recording(path, geometry, regime, list(layers))
        self._is_first = True

    def observe(self, step: int, layer: int, counts_NE: npt.NDArray[np.int64]) -> None:
        """A recording does not react to routing."""

    def due(self, step: int) -> list[ExpertLayout] | None:
        """What was recorded for this step; at first, what was in force by then."""
        if self._is_first:
            self._is_first = False
            step = max((made for made in self._layouts if made <= step), default=step)
        return self._layouts.get(step)

    def close(self) -> None:
        """Nothing runs."""


class LayoutRecorder:
    """Writes every applied set of layouts as a line of JSON, so that a run can be replayed.

    A recording that is there already is continued, as by a resumed run: what it holds of steps
    before the first one recorded now stays.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        regime: Regime,
        layers: Sequence[str],
        first_step: int,
    ) -> None:
        """Open the recording.

        Raises:
            ValueError: one of another shape, or a damaged one, is there already.
            OSError: it cannot be written.
        """
        kept = _read_recording(path, geometry, regime, list(layers)) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Line by line, so that a run that is killed leaves every layout it used.
        self._file = path.open("w", buffering=1)
        self._write(_header(geometry, regime, list(layers)))
        for step, layouts in kept.items():
            if step < first_step:
                self.record(step, layouts)

    def record(self, step: int, layouts: Sequence[ExpertLayout]) -> None:
        """Layouts that took effect with `step`."""
        self._write({"step": step, "slots": [layout.to_list() for layout in layouts]})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def recording_path(directory: str, group_index: int) -> Path:
    """The file of one FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"group-{group_index}.jsonl"


def _header(geometry: Geometry, regime: Regime, layers: list[str]) -> dict[str, Any]:
    """What a recording is made for: its layouts fit nothing else, its results no other regime."""
    return {
        "num_ranks": geometry.num_ranks,
        "capacity": geometry.capacity,
        "num_experts": geometry.num_experts,
        **regime,
        "layers": layers,
    }


def _read_recording(
    path: Path, geometry: Geometry, regime: Regime, layers: list[str]
) -> dict[int, list[ExpertLayout]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"layout recording: cannot read {path}: {error}; give a directory written by "
            "--fsep-record-layouts in a run with the same parallel sizes"
        ) from error
    wanted = _header(geometry, regime, layers)
    layouts: dict[int, list[ExpertLayout]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if number == 1:
                if entry != wanted:
                    raise ValueError(f"was recorded for {entry}, this run is {wanted}")
                continue
            if set(entry) != {"step", "slots"}:
                raise ValueError(f"has {sorted(entry)}, expected 'slots' and 'step'")
            step, last = entry["step"], next(reversed(layouts), -1)
            if type(step) is not int or step <= last:
                raise ValueError(f"step {step!r} is no integer above {last}")
            if len(entry["slots"]) != len(layers):
                raise ValueError(f"has {len(entry['slots'])} layers, expected {len(layers)}")
            layouts[step] = [
                ExpertLayout.from_slots(
                    geometry.num_ranks, geometry.capacity, geometry.num_experts, slots
                )
                for slots in entry["slots"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"layout recording: {path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"layout recording: {path} is empty")
    return layouts
