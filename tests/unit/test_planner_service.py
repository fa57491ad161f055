"""The planner's thread handles every step, and no fault of a strategy reaches training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan, PlannerService

N, C, E = 4, 2, 4
INITIAL = ExpertLayout.static(N, C, E)
PATIENCE_S = 300.0

Planner = Callable[[Int64, ExpertLayout], object]


class Scripted:
    name = "scripted"

    def __init__(self, plan: Planner) -> None:
        self._plan = plan

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        return self._plan(counts_NE, current)  # type: ignore[return-value]


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


def made_from(value: int) -> ExpertLayout:
    return layout_of(counts(value), INITIAL)


class Services:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.started: list[PlannerService] = []

    def start(
        self, plan: Planner, layers: tuple[int, ...] = (0, 1), lossless: bool = False
    ) -> PlannerService:
        service = PlannerService(
            Scripted(plan), layers, INITIAL, self.warnings.append, lossless, Newest()
        )
        self.started.append(service)
        return service


@pytest.fixture
def services() -> Iterator[Services]:
    services = Services()
    yield services
    for service in services.started:
        service.close(0.0)


def submit_step(service: PlannerService, step: int, layers: tuple[int, ...] = (0, 1)) -> None:
    for layer in layers:
        service.submit(step, layer, counts(100 * step + layer))


def wait_for(service: PlannerService, step: int) -> Plan:
    plan = service.wait(step, PATIENCE_S)
    assert plan is not None
    return plan


def test_a_plan_holds_a_layout_for_every_layer(services: Services) -> None:
    service = services.start(layout_of)
    service.submit(3, 0, counts(300))
    assert service.wait(3, 0.05) is None and service.ready(3) is None
    service.submit(3, 1, counts(301))
    plan = wait_for(service, 3)
    assert plan.source_step == 3 and plan.plan_ms > 0
    assert plan.layouts == {0: made_from(300), 1: made_from(301)}
    assert service.failures == 0 and len(services.warnings) == 1


def test_ready_gives_the_newest_plan_that_is_old_enough_once(services: Services) -> None:
    service = services.start(layout_of, lossless=True)
    for step in (0, 1, 2, 3, 9):
        submit_step(service, step)
    service.state(PATIENCE_S)  # a wait would forget the earlier plans
    assert service.ready(-1) is None
    for asked, made in ((2, 2), (8, 3)):
        plan = service.ready(asked)
        assert plan is not None and plan.source_step == made
        assert service.ready(asked) is None
    assert wait_for(service, 9).source_step == 9


def test_the_next_plan_starts_from_the_last_one(services: Services) -> None:
    seen: list[ExpertLayout] = []

    def plan(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        seen.append(current)
        return layout_of(counts_NE, current)

    service = services.start(plan, layers=(7,), lossless=True)
    for step in range(3):
        submit_step(service, step, layers=(7,))
    wait_for(service, 2)
    assert seen == [INITIAL, made_from(7), made_from(107)]


def test_a_slow_strategy_plans_from_the_newest_counts(services: Services) -> None:
    gate = Gate()
    service = services.start(gate)
    submit_step(service, 0)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    for step in range(1, 50):
        submit_step(service, step)  # would block forever if it waited for the planner
    assert service.wait(1, PATIENCE_S) is None
    assert "step 1 was dropped" in services.warnings[0]  # and no overrun is reported
    gate.go_on.release(4)
    assert wait_for(service, 49).layouts[0] == made_from(4900)
    assert service.wait(50, 0.0) is None


@pytest.mark.parametrize(("lossless", "expected"), [(False, 77), (True, 1)])
def test_counts_are_copied_and_new_ones_replace_unplanned_ones_unless_lossless(
    services: Services, lossless: bool, expected: int
) -> None:
    gate = Gate()
    service = services.start(gate, lossless=lossless)
    service.submit(0, 0, counts(0))
    assert gate.entered.acquire(timeout=PATIENCE_S)
    # The thread is at layer 0, so layer 1 is not planned yet.
    for value in (1, 77):
        reused = counts(value)
        service.submit(0, 1, reused)
        reused[:] = 6
    gate.go_on.release(2)
    assert wait_for(service, 0).layouts[1] == made_from(expected)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_step_that_lost_a_layer_does_not_hold_up_later_ones(
    services: Services, lossless: bool
) -> None:
    service = services.start(layout_of, lossless=lossless)
    service.submit(0, 0, counts(0))
    submit_step(service, 1)
    service.submit(0, 1, counts(1))
    assert wait_for(service, 1).layouts[0] == made_from(100)
    submit_step(service, 2)
    assert wait_for(service, 2).layouts[0] == made_from(200)
    assert services.warnings == ["counts of step 0 never came for layers [1]"]


def test_half_submitted_steps_do_not_pile_up(services: Services) -> None:
    service = services.start(layout_of)
    for step in range(100):
        service.submit(step, 0, counts(step))
    assert len(service._open) <= 4


def test_a_raising_strategy_keeps_the_last_good_layout_and_warns_once(services: Services) -> None:
    def plan(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        if counts_NE[0, 0] in (101, 201):
            raise RuntimeError("out of ideas")
        return layout_of(counts_NE, current)

    service = services.start(plan, lossless=True)
    for step in range(4):
        submit_step(service, step)
    for step, last_good in enumerate((1, 1, 1, 301)):
        expected = {0: made_from(100 * step), 1: made_from(last_good)}
        assert wait_for(service, step).layouts == expected
    assert service.failures == 2
    assert services.warnings == [
        "planner scripted raised RuntimeError: out of ideas; the layer keeps its layout"
    ]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType, not an ExpertLayout"),
        ([0, 1, 2, 3] * 2, "returned list, not an ExpertLayout"),
        (ExpertLayout.static(N, C + 1, E), r"(4, 3, 4), expected (4, 2, 4)"),
    ],
)
def test_an_illegal_layout_is_not_passed_on(
    services: Services, result: object, message: str
) -> None:
    service = services.start(lambda counts_NE, current: result)
    submit_step(service, 0)
    assert wait_for(service, 0).layouts == {0: INITIAL, 1: INITIAL}
    assert service.failures == 2
    assert len(services.warnings) == 1
    assert message in services.warnings[0]


def test_a_layout_that_the_run_cannot_use_is_not_passed_on() -> None:
    at_home, warnings = ExpertLayout.at_home(2, 3, 4), []
    geometry = Geometry(2, 4, 3, node_size=2)
    service = PlannerService(
        Scripted(lambda *_: at_home),
        (0,),
        geometry.static_layout,
        warnings.append,
        check_layout=geometry.check_layout,
    )
    service.submit(0, 0, np.ones((2, 4), dtype=np.int64))
    assert wait_for(service, 0).layouts == {0: geometry.static_layout}
    assert service.close(PATIENCE_S)
    assert len(warnings) == 1 and "empty slots, which only --fsep-sharding experts" in warnings[0]


def test_a_failing_logger_does_not_end_the_thread() -> None:
    def on_warning(message: str) -> None:
        raise OSError("disk full")

    service = PlannerService(Scripted(lambda *_: None), (0,), INITIAL, on_warning)
    for step in range(2):
        submit_step(service, step, layers=(0,))
        wait_for(service, step)
    assert service.failures == 2
    assert service.close(PATIENCE_S)


def test_a_wait_that_times_out_returns_none_and_later_steps_go_on(services: Services) -> None:
    gate = Gate()
    service = services.start(gate, lossless=True)
    submit_step(service, 0)
    assert service.wait(0, 0.05) is None
    assert services.warnings == [
        "the plan of step 0 was not complete after 0.05 s; layouts stay as they are"
    ]
    gate.go_on.release(4)
    submit_step(service, 1)
    assert wait_for(service, 1).source_step == 1
    with pytest.raises(ValueError, match="cannot wait for step 0: the plan of step 1 was already"):
        service.wait(0, 0.0)


# The thread is meant to end with an exception, which pytest would report.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_never_hangs_the_caller(services: Services) -> None:
    def plan(counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        raise SystemExit

    service = services.start(plan)
    submit_step(service, 0)
    assert service.wait(0, PATIENCE_S) is None
    submit_step(service, 1)
    assert service.wait(1, PATIENCE_S) is None
    assert service.ready(1) is None
    assert service.close(PATIENCE_S)
    assert services.warnings == ["the planner's thread is dead; layouts stay as they are"]


def test_state_does_not_wait_for_ever_and_leaves_out_what_is_not_planned(
    services: Services,
) -> None:
    gate = Gate()
    service = services.start(gate, layers=(0,), lossless=True)
    service.submit(0, 0, counts(0))
    state = service.state(0.05)
    assert not state.caught_up and state.plans == []
    gate.go_on.release()
    state = service.state(PATIENCE_S)
    assert state.caught_up and [plan.source_step for plan in state.plans] == [0]
    assert service.wait(0, PATIENCE_S) is state.plans[0], "reading it changed nothing"


def test_close_while_busy_returns_in_time(services: Services) -> None:
    gate = Gate()
    service = services.start(gate)
    submit_step(service, 0)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    assert not service.close(0.05)
    assert service.wait(0, PATIENCE_S) is None
    submit_step(service, 1)
    gate.go_on.release(1)
    assert service.close(PATIENCE_S)
    assert service.ready(1) is None
    assert services.warnings == ["the planner is closed; layouts stay as they are"]


def test_close_wakes_a_waiting_caller(services: Services) -> None:
    service = services.start(layout_of)
    waits, wait = threading.Event(), service._changed.wait

    def noticed(timeout_s: float | None = None) -> bool:
        # Holds the lock, which `close` gets once the caller sleeps.
        if threading.current_thread() is threading.main_thread():
            waits.set()
        return wait(timeout_s)

    def close() -> None:
        waits.wait()
        service.close(PATIENCE_S)

    closer = threading.Thread(target=close)
    with mock.patch.object(service._changed, "wait", noticed):
        closer.start()
        assert service.wait(0, PATIENCE_S) is None
    closer.join()
    assert services.warnings == ["the planner is closed; layouts stay as they are"]


def test_callers_mistakes_are_quoted(services: Services) -> None:
    service = services.start(layout_of)
    with pytest.raises(ValueError, match=r"layer 5 is not planned here; layers are \(0, 1\)"):
        service.submit(0, 5, counts(0))
    with pytest.raises(ValueError, match=r"step 0, layer 1 has shape \(4, 3\), expected"):
        service.submit(0, 1, counts(0)[:, :3])
    with pytest.raises(ValueError, match=r"got \(\)"):
        services.start(layout_of, layers=())
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        services.start(layout_of, layers=(1, 1))
    strategy = Scripted(layout_of)
    with pytest.raises(ValueError, match=r"no layout for layers \[1\]; it has \[0\]"):
        PlannerService(strategy, (0, 1), {0: INITIAL}, services.warnings.append)
    mixed = {0: INITIAL, 1: ExpertLayout.static(N, C + 1, E)}
    with pytest.raises(ValueError, match="initial layouts differ"):
        PlannerService(strategy, (0, 1), mixed, services.warnings.append)
