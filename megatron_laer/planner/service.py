"""Background planning: one thread makes layouts from counts, and training waits only on request.

The thread only computes: no collectives, no device work. Callers get legal layouts or none, even if
a strategy misbehaves. An executor would not do: its threads are joined at exit, so a hanging
strategy would keep the process alive.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import Forecast, SmoothedForecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import Strategy

# Maximum open steps before the oldest is dropped (not in lossless mode).
_OPEN_STEPS = 4


@dataclass(frozen=True)
class Plan:
    """Layouts of all layers from the counts of `source_step`, made in `plan_ms` by the strategy."""

    source_step: int
    layouts: dict[int, ExpertLayout]
    plan_ms: float


@dataclass(frozen=True)
class ServiceState:
    """State of a service between two steps.

    Attributes:
        forecasts: by layer.
        plans: complete and not returned yet, oldest first.
        caught_up: whether all full steps are planned.
    """

    forecasts: dict[int, Forecast]
    plans: list[Plan]
    caught_up: bool


@dataclass
class _OpenStep:
    """Step that is being submitted or planned; touched under the service's lock only."""

    pending: dict[int, Int64] = field(default_factory=dict)
    submitted: set[int] = field(default_factory=set)
    layouts: dict[int, ExpertLayout] = field(default_factory=dict)
    plan_ms: float = 0.0


class PlannerService:
    """Thread that plans the layers of each step as their counts arrive, oldest step first.

    A plan is complete once all layers are planned, each from a forecast that ends with the step's
    counts. Complete plans are kept until `ready` or `wait` returns that plan or a newer one, so
    call one of them at every step.

    Steps that lack layers when a later step is full are dropped with a warning. Without `lossless`,
    full steps whose planning has not started are dropped too, and so is the oldest of more than
    four open steps.

    If a strategy raises or returns no legal layout, the layer keeps its layout of the last complete
    plan. `failures` counts it, with one warning per cause. A dead thread leaves the plans that are
    complete; after them, `ready` and `wait` return None.

    Args:
        on_warning: called from both threads, never under the lock; its exceptions are ignored.
        lossless: plan every step, for callers that `wait` for each.
        plans: complete plans of an earlier service, as `state` returned them.
        check_layout: raises for a layout that the run cannot use.
    """

    def __init__(
        self,
        strategy: Strategy | Mapping[int, Strategy],
        layers: Sequence[int],
        initial: ExpertLayout | Mapping[int, ExpertLayout],
        on_warning: Callable[[str], None],
        lossless: bool = False,
        forecast: Forecast | Mapping[int, Forecast] | None = None,
        plans: Sequence[Plan] = (),
        check_layout: Callable[[ExpertLayout], None] | None = None,
    ) -> None:
        self._check_layout = check_layout
        self._layers = tuple(layers)
        self._strategies = _by_layer(self._layers, strategy)
        self._good = _initial_layouts(self._layers, plans[-1].layouts if plans else initial)
        self._on_warning = on_warning
        self._lossless = lossless
        # Changed by the thread alone, one layer at a time.
        self._forecasts = _by_layer(self._layers, forecast or SmoothedForecast())

        self._changed = threading.Condition()
        self._open: dict[int, _OpenStep] = {}
        self._complete = {plan.source_step: plan for plan in plans}
        self._returned_step: int | None = None
        # Newest step with all layers submitted; no earlier one is opened again.
        self._full_step = max(self._complete, default=None)
        self._failures = 0
        self._warned: set[str] = set()
        self._closing = False
        self._alive = True

        self._thread = threading.Thread(target=self._run, name="fsep-planner", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        with self._changed:
            return self._failures

    def submit(self, step: int, layer: int, counts_NE: npt.NDArray[np.integer]) -> None:
        """Queue a copy of a layer's counts of a step; never wait for planning.

        They are what its forecast observes: int [N, E], or [M, N, E] of microbatches.

        Counts submitted again replace those not yet planned; in lossless mode the first ones stay.
        Dropped, planned and outdated steps are ignored.
        """
        if layer not in self._good:
            raise ValueError(f"layer {layer} is not planned here; layers are {self._layers}")
        like = self._good[layer]
        if counts_NE.shape[-2:] != (like.num_ranks, like.num_experts):
            raise ValueError(
                f"counts_NE of step {step}, layer {layer} has shape {counts_NE.shape}, expected "
                f"[ranks, experts] = {(like.num_ranks, like.num_experts)}"
            )
        copied_NE = np.array(counts_NE, dtype=np.int64)
        with self._changed:
            if self._closing or not self._alive or self._is_past(step):
                return
            opened = self._open.setdefault(step, _OpenStep())
            again = layer in opened.submitted
            if again and (self._lossless or layer not in opened.pending):
                return
            opened.pending[layer] = copied_NE
            opened.submitted.add(layer)
            warnings = self._drop_steps(step)
            self._changed.notify_all()
        for warning in warnings:
            self._warn(warning)

    def ready(self, step: int) -> Plan | None:
        """Return the newest complete plan of a step up to `step`, once; None if there is none."""
        with self._changed:
            usable = [made for made in self._complete if made <= step]
            return self._take(max(usable)) if usable else None

    def wait(self, step: int, timeout_s: float) -> Plan | None:
        """Wait for the plan of this step's counts; without it, warn and return None."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            if _at_or_before(step, self._returned_step):
                raise ValueError(
                    f"cannot wait for step {step}: the plan of step {self._returned_step} was "
                    f"already returned; wait for later steps"
                )
            while step not in self._complete:
                problem = self._why_never(step)
                left_s = deadline_s - time.monotonic()
                if problem is None and left_s <= 0:
                    problem = f"the plan of step {step} was not complete after {timeout_s} s"
                if problem is not None:
                    break
                # A Condition takes no infinite timeout.
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            else:
                return self._take(step)
        self._warn(f"{problem}; layouts stay as they are")
        return None

    def state(self, timeout_s: float) -> ServiceState:
        """Return the state, after waiting up to `timeout_s` seconds for the thread to catch up.

        A stopped thread has caught up.
        """

        def is_caught_up() -> bool:
            busy = any(map(self._is_full, self._open.values()))
            return not busy or self._closing or not self._alive

        with self._changed:
            caught_up = self._changed.wait_for(is_caught_up, timeout_s)
            plans = [self._complete[step] for step in sorted(self._complete)]
            return ServiceState(dict(self._forecasts), plans, caught_up)

    def drop_late_steps(self) -> None:
        with self._changed:
            self._lossless = False

    def close(self, timeout_s: float) -> bool:
        """Stop the thread; return whether it ended in time."""
        with self._changed:
            self._closing = True
            self._open.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Caller's side, under the lock.

    def _take(self, step: int) -> Plan:
        plan = self._complete[step]
        self._complete = {made: kept for made, kept in self._complete.items() if made > step}
        self._returned_step = step
        return plan

    def _why_never(self, step: int) -> str | None:
        if self._closing:
            return "the planner is closed"
        if not self._alive:
            return "the planner's thread is dead"
        if self._is_past(step):
            return f"step {step} was dropped by the planner, a later one was already submitted"
        return None

    def _is_past(self, step: int) -> bool:
        return step not in self._open and _at_or_before(step, self._full_step)

    def _drop_steps(self, submitted_step: int) -> list[str]:
        """Drop steps that the submission of this one makes pointless; return warnings."""
        warnings = []
        full = self._is_full(self._open[submitted_step])
        if full and not _at_or_before(submitted_step, self._full_step):
            self._full_step = submitted_step
        for step in sorted(self._open):
            opened = self._open[step]
            if not full or step >= submitted_step:
                continue
            if missing := sorted(set(self._layers) - opened.submitted):
                warnings.append(f"counts of step {step} never came for layers {missing}")
                del self._open[step]
            elif not self._lossless and len(opened.pending) == len(opened.submitted):  # not started
                del self._open[step]
        while len(self._open) > _OPEN_STEPS and not self._lossless:
            del self._open[min(self._open)]
        return warnings

    def _is_full(self, opened: _OpenStep) -> bool:
        return len(opened.submitted) == len(self._layers)

    # Thread's side.

    def _run(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                step, layer, counts_NE, current = job
                start_s = time.perf_counter()
                layout, problem = self._plan_layer(layer, counts_NE, current)
                self._store(step, layer, layout, (time.perf_counter() - start_s) * 1e3, problem)
                if problem is not None:
                    self._warn(problem)
        finally:
            with self._changed:
                self._alive = False
                died = not self._closing
                self._changed.notify_all()
            if died:
                self._warn("the planner's thread is dead; layouts stay as they are")

    def _next_job(self) -> tuple[int, int, Int64, ExpertLayout] | None:
        with self._changed:
            while not self._closing:
                # Only the oldest step: a later one starts from its layouts.
                if self._open:
                    step = min(self._open)
                    opened = self._open[step]
                    if opened.pending:
                        layer = next(iter(opened.pending))
                        return step, layer, opened.pending.pop(layer), self._good[layer]
                self._changed.wait()
        return None

    def _plan_layer(
        self, layer: int, counts_NE: Int64, current: ExpertLayout
    ) -> tuple[ExpertLayout, str | None]:
        """Return the strategy's layout, or the current one and the problem."""
        strategy = self._strategies[layer]
        try:
            forecast = self._forecasts[layer].observe(counts_NE)
            self._forecasts[layer] = forecast
            layout: object = strategy.plan(forecast.counts_NE(), current)
            if not isinstance(layout, ExpertLayout):
                problem = f"returned {type(layout).__name__}, not an ExpertLayout"
            elif layout.shape != current.shape:
                problem = (
                    f"returned a layout for (ranks, capacity, experts) = {layout.shape}, "
                    f"expected {current.shape}"
                )
            else:
                if self._check_layout is not None:
                    self._check_layout(layout)
                return layout, None
        except Exception as error:  # A wrong planner changes speed, never correctness.
            problem = f"raised {type(error).__name__}: {error}"
        return current, f"planner {strategy.name} {problem}; the layer keeps its layout"

    def _store(
        self, step: int, layer: int, layout: ExpertLayout, plan_ms: float, problem: str | None
    ) -> None:
        with self._changed:
            self._failures += problem is not None
            opened = self._open.get(step)
            if opened is None:  # Dropped or closed meanwhile.
                return
            opened.layouts[layer] = layout
            opened.plan_ms += plan_ms
            if len(opened.layouts) == len(self._layers):
                layouts = {planned: opened.layouts[planned] for planned in self._layers}
                self._complete[step] = Plan(step, layouts, opened.plan_ms)
                self._good = layouts
                del self._open[step]
            self._changed.notify_all()

    def _warn(self, message: str) -> None:
        with self._changed:
            if message in self._warned:
                return
            self._warned.add(message)
        try:
            self._on_warning(message)
        except Exception:  # A failing logger must end neither the thread nor the step.
            return


def _initial_layouts(
    layers: tuple[int, ...], initial: ExpertLayout | Mapping[int, ExpertLayout]
) -> dict[int, ExpertLayout]:
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be at least one and all different, got {layers}")
    if isinstance(initial, Mapping) and (missing := [n for n in layers if n not in initial]):
        raise ValueError(f"initial has no layout for layers {missing}; it has {sorted(initial)}")
    layouts = _by_layer(layers, initial)
    shapes = {layout.shape for layout in layouts.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"initial layouts differ in (ranks, capacity, experts): {sorted(shapes)}; a service "
            "plans layers of one shape"
        )
    return layouts


def _by_layer[T](layers: tuple[int, ...], value: T | Mapping[int, T]) -> dict[int, T]:
    if isinstance(value, Mapping):
        return {layer: value[layer] for layer in layers}
    return dict.fromkeys(layers, value)


def _at_or_before(step: int, mark: int | None) -> bool:
    return mark is not None and step <= mark
