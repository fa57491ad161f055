"""Background planning: one thread makes layouts from counts, and training waits only on request.

The thread only computes: no collectives, no device work. Callers get legal layouts or none, even if
a strategy misbehaves. An executor would not do: its threads are joined at exit, so a hanging
strategy would keep the process alive.

Legend: N ranks, E experts, M microbatches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import Forecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import Strategy

# Maximum open steps before the oldest is dropped, unless plans are waited for.
_OPEN_STEPS = 4
# Time-out where plans are waited for; a planner that exceeds it is not waited for again.
WAIT_TIMEOUT_S = 120.0
# Wait for pending plans before a checkpoint is saved, where plans are not waited for.
PLANS_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Plan:
    """Layouts of all layers from the counts of `source_step`, made in `plan_ms` by the strategy."""

    source_step: int
    layouts: tuple[ExpertLayout, ...]
    plan_ms: float


@dataclass(frozen=True)
class ServiceState:
    """State of a service between two steps.

    Attributes:
        forecasts: by layer.
        plans: complete and not in force yet, oldest first.
        caught_up: whether all full steps are planned.
    """

    forecasts: tuple[Forecast, ...]
    plans: tuple[Plan, ...]
    caught_up: bool


@dataclass
class _Step:
    """Entry of the ledger: a step's counts and plan; touched under the service's lock only.

    `counts` are by layer, None where they are not for planning any more. `layouts` are those made
    so far.
    """

    counts: dict[int, Int64 | None] = field(default_factory=dict)
    layouts: dict[int, ExpertLayout] = field(default_factory=dict)
    plan_ms: float = 0.0
    plan: Plan | None = None
    is_dropped: bool = False

    @property
    def is_open(self) -> bool:
        return self.plan is None and not self.is_dropped

    @property
    def is_started(self) -> bool:
        return any(counts_NE is None for counts_NE in self.counts.values())

    def drop(self) -> None:
        self.is_dropped, self.counts = True, dict.fromkeys(self.counts)


class PlannerService:
    """Thread that plans the layers of each step as their counts arrive, oldest step first.

    The ledger has every step from its first counts until its plan is in force, or can no longer be.
    A plan is complete once all layers are planned, each from a forecast that ends with the step's
    counts. One from the counts of step t is due at step t + `lag`.

    Steps that lack layers when a later step is full are dropped with a warning. Unless plans are
    waited for, full steps whose planning has not started are dropped too. So is then the oldest of
    more than four open steps.

    If a strategy raises or returns no legal layout, the layer keeps its layout of the last complete
    plan. `failures` counts it, with one warning per cause. A dead thread leaves the plans that are
    complete; after them, nothing is due.

    Args:
        strategies, initial, forecasts: of each layer.
        waits: wait for plans that are due, until one is late.
        on_warning: called from both threads, never under the lock; its exceptions are ignored.
        plans: complete plans of an earlier service, as `state` returned them.
        check_layout: raises for a layout that the run cannot use.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        initial: Sequence[ExpertLayout],
        forecasts: Sequence[Forecast],
        *,
        lag: int,
        waits: bool,
        on_warning: Callable[[str], None],
        plans: Sequence[Plan] = (),
        check_layout: Callable[[ExpertLayout], None] | None = None,
    ) -> None:
        self.plan_ms = 0.0
        self.late_plans = 0
        self._check_layout = check_layout
        self._strategies = tuple(strategies)
        self._good = tuple(plans[-1].layouts if plans else initial)
        self._on_warning = on_warning
        self._lag = lag
        self._waits = waits
        # Changed by the thread alone, one layer at a time.
        self._forecasts = [*forecasts]

        self._changed = threading.Condition()
        full = range(len(self._good))
        self._ledger = {plan.source_step: _Step(dict.fromkeys(full), plan=plan) for plan in plans}
        # Newest step with the counts of all layers, and the newest one whose plan was asked for.
        self._full_step = max(self._ledger, default=-1)
        self._asked_step = -1
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

    def submit(self, step: int, layer: int, counts_NE: Int64) -> None:
        """Queue a layer's counts of a step, which must not change; never wait for planning.

        They are what its forecast observes: int [N, E], or [M, N, E] of microbatches.

        Counts submitted again replace those not yet planned; where plans are waited for, the first
        ones stay. Those of dropped, planned and outdated steps are not planned.
        """
        like = self._good[layer]
        if counts_NE.shape[-2:] != (like.num_ranks, like.num_experts):
            raise ValueError(
                f"counts_NE of step {step}, layer {layer} has shape {counts_NE.shape}, expected "
                f"[ranks, experts] = {(like.num_ranks, like.num_experts)}"
            )
        warnings = []
        with self._changed:
            if self._closing or step <= self._asked_step:
                return
            entry = self._ledger.setdefault(step, _Step(is_dropped=step <= self._full_step))
            is_planned = entry.is_open and self._alive
            if layer not in entry.counts:
                entry.counts[layer] = counts_NE if is_planned else None
            elif is_planned and not self._waits and entry.counts[layer] is not None:
                entry.counts[layer] = counts_NE
            if self._is_full(entry):
                self._full_step = max(self._full_step, step)
                warnings = self._drop_before(step)
            if not self._waits:
                self._drop_oldest()
            self._changed.notify_all()
        self._warn(*warnings)

    def due(self, step: int) -> tuple[ExpertLayout, ...] | None:
        """Return the layouts that take effect with `step`, one per layer; None for no change.

        They are planned from step - lag, or from the newest step up to it unless plans are waited
        for.
        """
        source_step = step - self._lag
        warnings = []
        with self._changed:
            entry = self._ledger.get(source_step)
            is_expected = (
                source_step > self._asked_step and entry is not None and self._is_full(entry)
            )
            self._asked_step = max(self._asked_step, source_step)
            if not self._waits:
                made = [of.plan for at, of in self._ledger.items() if at <= source_step and of.plan]
                plan = max(made, key=lambda of: of.source_step, default=None)
            elif entry is None or not is_expected:
                plan = None
            else:
                problem = self._wait_for(source_step, entry)
                plan = entry.plan
                if problem is not None:
                    warnings += [f"{problem}; layouts stay as they are", self._stop_waiting()]
            if is_expected and (plan is None or plan.source_step != source_step):
                self.late_plans += 1
                if self.late_plans == 1 and not warnings:
                    warnings.append(
                        f"the plan from step {source_step} was not ready at step {step}, which "
                        f"keeps older layouts; --fsep-set plan_lag={self._lag + 1} gives plans "
                        "more time, and fsep_late_plans counts those that are late"
                    )
            self._forget(source_step, plan)
        self._warn(*warnings)
        if plan is None:
            return None
        self.plan_ms = plan.plan_ms
        return plan.layouts

    def state(self) -> ServiceState:
        """Return the state, after waiting some time for the thread to catch up.

        A stopped thread has caught up.
        """

        def is_caught_up() -> bool:
            busy = any(of.is_open and self._is_full(of) for of in self._ledger.values())
            return not busy or self._closing or not self._alive

        warnings = []
        with self._changed:
            timeout_s = WAIT_TIMEOUT_S if self._waits else PLANS_TIMEOUT_S
            caught_up = self._changed.wait_for(is_caught_up, timeout_s)
            if self._waits and not caught_up:
                warnings.append(self._stop_waiting())
            plans = tuple(of.plan for _, of in sorted(self._ledger.items()) if of.plan)
            state = ServiceState(tuple(self._forecasts), plans, caught_up)
        self._warn(*warnings)
        return state

    def close(self, timeout_s: float = 1.0) -> bool:
        """Stop the thread; return whether it ended in time."""
        with self._changed:
            self._closing = True
            for entry in self._ledger.values():
                if entry.is_open:
                    entry.drop()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Caller's side, under the lock.

    def _wait_for(self, step: int, entry: _Step) -> str | None:
        """Wait for the plan of a full step; return the reason if there will be none."""
        deadline_s = time.monotonic() + WAIT_TIMEOUT_S
        while entry.plan is None:
            if self._closing:
                return "the planner is closed"
            if not self._alive:
                return "the planner's thread is dead"
            if entry.is_dropped:
                return f"step {step} was dropped by the planner, a later one was already submitted"
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return f"the plan of step {step} was not complete after {WAIT_TIMEOUT_S} s"
            self._changed.wait(left_s)
        return None

    def _stop_waiting(self) -> str:
        """Stop waiting, so that a hanging planner costs its time once and not at every step."""
        self._waits = False
        return "from here on late plans are not waited for, as with --fsep-late-plan keep"

    def _forget(self, asked_step: int, returned: Plan | None) -> None:
        """Remove the steps whose plan is in force, or can no longer be."""
        last = -1 if returned is None else returned.source_step
        self._ledger = {
            at: of
            for at, of in self._ledger.items()
            if at > asked_step or (at > last and not of.is_dropped)
        }

    def _drop_before(self, full_step: int) -> list[str]:
        """Drop the steps that a full one makes pointless; return warnings."""
        warnings = []
        for step, entry in sorted(self._ledger.items()):
            if step >= full_step or not entry.is_open:
                continue
            if missing := sorted({*range(len(self._good))} - {*entry.counts}):
                warnings.append(f"counts of step {step} never came for layers {missing}")
                entry.drop()
            elif not self._waits and not entry.is_started:
                entry.drop()
        return warnings

    def _drop_oldest(self) -> None:
        steps = sorted(step for step, entry in self._ledger.items() if entry.is_open)
        for step in steps[:-_OPEN_STEPS]:
            self._ledger[step].drop()

    def _is_full(self, entry: _Step) -> bool:
        return len(entry.counts) == len(self._good)

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
                step = min((at for at, of in self._ledger.items() if of.is_open), default=None)
                if step is not None:
                    counts = self._ledger[step].counts
                    for layer, counts_NE in counts.items():
                        if counts_NE is not None:
                            counts[layer] = None
                            return step, layer, counts_NE, self._good[layer]
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
            entry = self._ledger.get(step)
            if entry is None or entry.is_dropped:  # meanwhile
                return
            entry.layouts[layer] = layout
            entry.plan_ms += plan_ms
            if len(entry.layouts) == len(self._good):
                self._good = tuple(made for _, made in sorted(entry.layouts.items()))
                entry.plan = Plan(step, self._good, entry.plan_ms)
            self._changed.notify_all()

    def _warn(self, *messages: str) -> None:
        for message in messages:
            with self._changed:
                is_new = message not in self._warned
                self._warned.add(message)
            if is_new:
                try:
                    self._on_warning(message)
                except Exception:  # A failing logger must end neither the thread nor the step.
                    continue
