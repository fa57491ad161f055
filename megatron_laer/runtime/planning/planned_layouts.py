"""Layouts planned ahead on rank 0 of an FSEP group. Nothing here takes part in a collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import Forecast, SmoothedForecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService, ServiceState
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.strategies import Strategy

# Time-out under `wait`; a planner that exceeds it is not waited for again.
WAIT_TIMEOUT_S = 120.0

# Wait for pending plans before a checkpoint is saved, under `keep`.
PLANS_TIMEOUT_S = 1.0


class PlannedLayouts:
    """Layouts from a strategy that runs in a background thread.

    Args:
        lag: a plan from the counts of step t takes effect at step t + lag.
        wait: wait for plans that are due, until one is late.
        forecast: first state of a layer's forecast.
        resumed: state of an earlier run, with the same layers. Another kind of forecast is dropped.
        check_layout: raises for a layout that the run cannot use.
    """

    def __init__(
        self,
        strategy: Strategy | Mapping[int, Strategy],
        initial: Sequence[ExpertLayout],
        *,
        lag: int,
        wait: bool,
        on_warning: Callable[[str], None],
        forecast: Forecast | None = None,
        resumed: PlannerState | None = None,
        check_layout: Callable[[ExpertLayout], None] | None = None,
    ) -> None:
        self._lag = lag
        self._wait = wait
        self._on_warning = on_warning
        self._layers = range(len(initial))
        plans = resumed.plans if resumed else ()
        first = SmoothedForecast() if forecast is None else forecast
        saved: Sequence[Forecast] = resumed.forecasts if resumed else [first] * len(initial)
        forecasts = [known if type(known) is type(first) else first for known in saved]
        self._observed = {plan.source_step: set(self._layers) for plan in plans}
        self._service = PlannerService(
            strategy,
            self._layers,
            dict(enumerate(initial)),
            on_warning,
            lossless=wait,
            forecast=dict(enumerate(forecasts)),
            plans=plans,
            check_layout=check_layout,
        )
        self.plan_ms = 0.0
        self.late_plans = 0

    @property
    def failures(self) -> int:
        return self._service.failures

    def observe(self, step: int, layer: int, counts_NE: Int64) -> None:
        self._observed.setdefault(step, set()).add(layer)
        self._service.submit(step, layer, counts_NE)

    def due(self, step: int) -> list[ExpertLayout] | None:
        """Return the layouts that take effect with `step`, one per layer; None for no change.

        They are planned from step - lag, or under `keep` from the newest step up to it.
        """
        source_step = step - self._lag
        is_expected = len(self._observed.get(source_step, ())) == len(self._layers)
        waits = self._wait
        if not waits:
            plan = self._service.ready(source_step)
        elif not is_expected:
            plan = None
        else:
            plan = self._service.wait(source_step, WAIT_TIMEOUT_S)
            if plan is None:
                self._stop_waiting()
        if is_expected and (plan is None or plan.source_step != source_step):
            self.late_plans += 1
            if self.late_plans == 1 and not waits:
                self._on_warning(
                    f"the plan from step {source_step} was not ready at step {step}, which keeps "
                    f"older layouts; --fsep-set plan_lag={self._lag + 1} gives plans more time, "
                    "and fsep_late_plans counts those that are late"
                )
        self._observed = {at: seen for at, seen in self._observed.items() if at > source_step}
        if plan is None:
            return None
        self.plan_ms = plan.plan_ms
        return [plan.layouts[layer] for layer in self._layers]

    def state(self) -> ServiceState:
        timeout_s = WAIT_TIMEOUT_S if self._wait else PLANS_TIMEOUT_S
        state = self._service.state(timeout_s)
        if self._wait and not state.caught_up:
            self._stop_waiting()
        return state

    def close(self) -> None:
        self._service.close(timeout_s=1.0)

    def _stop_waiting(self) -> None:
        """Stop waiting, so that a hanging planner costs its time once and not at every step."""
        self._wait = False
        self._service.drop_late_steps()
        self._on_warning(
            "from here on late plans are not waited for, as with --fsep-late-plan keep"
        )
