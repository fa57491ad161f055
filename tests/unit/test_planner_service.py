"""The planner's thread handles every step, and no fault of a strategy reaches training."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.planner import service as services_of
from megatron_laer.planner.forecast import WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan, PlannerService

N, C, E = 4, 2, 4
INITIAL = ExpertLayout.static(N, C, E)
PATIENCE_S = 300.0
LAG = 1

Planner = Callable[[Int64, ExpertLayout], object]


class Newest(WindowForecast):
    """Forecast by the newest counts, in tokens."""

    def observe(self, counts_NE: Int64) -> Newest:
        return Newest((counts_NE,))


class Gate:
    """Planner that waits in the middle of each call until the test releases it."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def __call__(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        self.entered.release()
        assert self.go_on.acquire(timeout=PATIENCE_S)
        return layout_of(counts_NE, current)


def counts(value: int) -> Int64:
    return np.full((N, E), value, dtype=np.int64)


def layout_of(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
    return ExpertLayout.random(N, C, E, seed=(int(counts_NE[0, 0]),))


def made_from(*values: int) -> tuple[ExpertLayout, ...]:
    return tuple(layout_of(counts(value), INITIAL) for value in values)


class Services:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.started: list[PlannerService] = []

    def start(self, plan: Planner, waits: bool = False, **more: Any) -> PlannerService:
        arguments = {"lag": LAG, "waits": waits, "on_warning": self.warnings.append} | more
        strategy: Any = SimpleNamespace(name="scripted", plan=plan)
        layers = [strategy] * 2, [INITIAL] * 2, [Newest()] * 2
        service = PlannerService(*layers, **arguments)
        self.started.append(service)
        return service


@pytest.fixture
def services() -> Iterator[Services]:
    services = Services()
    yield services
    for service in services.started:
        service.close(0.0)


@contextlib.contextmanager
def time_outs(seconds: float) -> Iterator[None]:
    with (
        mock.patch.object(services_of, "WAIT_TIMEOUT_S", seconds),
        mock.patch.object(services_of, "PLANS_TIMEOUT_S", seconds),
    ):
        yield


def submit_step(service: PlannerService, step: int) -> None:
    for layer in range(2):
        service.submit(step, layer, counts(100 * step + layer))


def due_after(service: PlannerService, step: int) -> tuple[ExpertLayout, ...] | None:
    """Return the layouts of this step's counts, once the thread has caught up."""
    with time_outs(PATIENCE_S):
        assert service.state().caught_up
    return service.due(step + LAG)


@pytest.mark.parametrize("waits", [False, True])
def test_a_plan_holds_a_layout_for_every_layer(services: Services, waits: bool) -> None:
    service = services.start(layout_of, waits)
    service.submit(3, 0, counts(300))
    assert service.due(3) is None
    service.submit(3, 1, counts(301))
    assert due_after(service, 3) == made_from(300, 301)
    assert service.due(4) is None, "a plan takes effect once"
    assert service.failures == service.late_plans == 0 and not services.warnings
    assert service.plan_ms > 0


def test_the_newest_plan_that_is_old_enough_is_due(services: Services) -> None:
    service = services.start(layout_of, lag=3)
    for step in (0, 1, 2, 9):
        submit_step(service, step)
        with time_outs(PATIENCE_S):
            assert service.state().caught_up
    assert service.due(2) is None
    assert service.due(5) == made_from(200, 201)
    assert service.due(11) is None and service.due(12) == made_from(900, 901)
    assert not service._ledger


def test_only_the_plan_of_the_due_step_is_taken_where_plans_are_waited_for(
    services: Services,
) -> None:
    service = services.start(layout_of, waits=True)
    for step in range(3):
        submit_step(service, step)
    for step in range(3):
        assert service.due(step + LAG) == made_from(100 * step, 100 * step + 1)
    for _ in range(2):  # Megatron's rerun state machine repeats a step
        submit_step(service, 5)
    assert service.due(5) is None and service.due(6) == made_from(500, 501)
    assert service.late_plans == 0 and not services.warnings


def test_plans_of_an_earlier_service_are_due_and_the_next_ones_start_from_them(
    services: Services,
) -> None:
    plans = [Plan(step, made_from(step, step), 2.5) for step in (6, 7)]
    seen: list[ExpertLayout] = []

    def plan(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        seen.append(current)
        return layout_of(counts_NE, current)

    service = services.start(plan, waits=True, plans=plans)
    assert service.due(7) == plans[0].layouts and service.plan_ms == 2.5
    assert service.state().plans == (plans[1],)
    for step in (8, 9):
        submit_step(service, step)
        assert service.due(step) is not None
    assert due_after(service, 9) == made_from(900, 901)
    assert seen == [*plans[1].layouts, *made_from(800, 801)]


def test_a_slow_strategy_plans_from_the_newest_counts(services: Services) -> None:
    gate = Gate()
    service = services.start(gate)
    submit_step(service, 0)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    for step in range(1, 50):
        submit_step(service, step)  # would block forever if it waited for the planner
        assert service.due(step) is None
    gate.go_on.release(4)
    assert due_after(service, 49) == made_from(4900, 4901)
    assert service.late_plans == 49
    (warning,) = services.warnings
    assert "from step 0 was not ready at step 1" in warning and "--fsep-set plan_lag=2" in warning
    assert len(service._ledger) == 0


@pytest.mark.parametrize(("waits", "expected"), [(False, 77), (True, 1)])
def test_new_counts_replace_unplanned_ones_unless_plans_are_waited_for(
    services: Services, waits: bool, expected: int
) -> None:
    gate = Gate()
    service = services.start(gate, waits)
    service.submit(0, 0, counts(0))
    assert gate.entered.acquire(timeout=PATIENCE_S)
    # The thread is at layer 0, so layer 1 is not planned yet.
    for value in (1, 77):
        service.submit(0, 1, counts(value))
    service.submit(0, 0, counts(5))
    gate.go_on.release(2)
    assert due_after(service, 0) == made_from(0, expected)


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_lost_a_layer_does_not_hold_up_later_ones(
    services: Services, waits: bool
) -> None:
    service = services.start(layout_of, waits)
    service.submit(0, 0, counts(0))
    submit_step(service, 1)
    service.submit(0, 1, counts(1))
    assert due_after(service, 1) == made_from(100, 101)
    submit_step(service, 2)
    assert due_after(service, 2) == made_from(200, 201)
    assert services.warnings == ["counts of step 0 never came for layers [1]"]


def test_half_submitted_steps_do_not_pile_up(services: Services) -> None:
    service = services.start(layout_of)
    for step in range(100):
        service.submit(step, 0, counts(step))
        service.due(step)
    assert len(service._ledger) <= 5


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType, not an ExpertLayout; the layer keeps its layout"),
        ([0, 1, 2, 3] * 2, "returned list, not an ExpertLayout"),
        (ExpertLayout.static(N, C + 1, E), r"(4, 3, 4), expected (4, 2, 4)"),
        (ExpertLayout.at_home(N, C, E), "empty slots, which only --fsep-sharding experts"),
    ],
)
def test_a_layout_that_the_run_cannot_use_is_not_passed_on(
    services: Services, result: object, message: str
) -> None:
    check = Geometry(N, E, C, node_size=2).check_layout
    service = services.start(lambda counts_NE, current: result, check_layout=check)
    submit_step(service, 0)
    assert due_after(service, 0) == (INITIAL, INITIAL)
    assert service.failures == 2
    assert len(services.warnings) == 1
    assert message in services.warnings[0]


def test_a_failing_logger_does_not_end_the_thread(services: Services) -> None:
    def on_warning(message: str) -> None:
        raise OSError("disk full")

    service = services.start(lambda *_: None, on_warning=on_warning)
    for step in range(2):
        submit_step(service, step)
        assert due_after(service, step) == (INITIAL, INITIAL)
    assert service.failures == 4
    assert service.close(PATIENCE_S)


NOT_WAITED_FOR = "from here on late plans are not waited for, as with --fsep-late-plan keep"


@pytest.mark.parametrize("first", ["a step", "a checkpoint"])
def test_a_planner_that_hangs_is_waited_for_once_and_its_return_is_noticed(
    services: Services, first: str
) -> None:
    gate = Gate()
    service = services.start(gate, waits=True)
    with time_outs(0.05):
        for step in range(60):
            submit_step(service, step)
            if step == 0 and first == "a checkpoint":
                assert not service.state().caught_up
            if step == 1:
                # Neither a step nor a checkpoint waits any more.
                assert not service._waits and not service.state().plans
            assert service.due(step + LAG) is None
    late = ["the plan of step 0 was not complete after 0.05 s; layouts stay as they are"]
    assert services.warnings[: 1 + (first == "a step")] == (
        [*late, NOT_WAITED_FOR] if first == "a step" else [NOT_WAITED_FOR]
    )
    assert service.late_plans == 60
    gate.go_on.release(1000)
    # The first and the newest of the 60 steps are planned, as under `keep`.
    assert due_after(service, 59) == made_from(5900, 5901)


# The thread is meant to end with an exception, which pytest would report.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("waits", [False, True])
def test_a_dead_thread_never_hangs_the_caller(services: Services, waits: bool) -> None:
    def plan(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        raise SystemExit

    service = services.start(plan, waits)
    for step in range(3):
        submit_step(service, step)
        assert due_after(service, step) is None
    assert service.late_plans == 3
    assert service.close(PATIENCE_S)
    assert services.warnings[0] == "the planner's thread is dead; layouts stay as they are"
    assert (NOT_WAITED_FOR in services.warnings) == waits


def test_close_while_busy_returns_in_time(services: Services) -> None:
    gate = Gate()
    service = services.start(gate, waits=True)
    submit_step(service, 0)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    assert not service.close(0.05)
    assert service.due(1) is None
    submit_step(service, 1)
    gate.go_on.release(1)
    assert service.close(PATIENCE_S)
    assert service.due(2) is None
    assert services.warnings[0] == "the planner is closed; layouts stay as they are"


def test_counts_of_another_shape_are_refused(services: Services) -> None:
    service = services.start(layout_of)
    with pytest.raises(ValueError, match=r"step 0, layer 1 has shape \(4, 3\), expected"):
        service.submit(0, 1, counts(0)[:, :3])
