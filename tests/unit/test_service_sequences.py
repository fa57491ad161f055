"""Random lives of the planner's service: steps, faults, saves and loads, against a plain account.

The service's thread is real. It stops in each call of a strategy until the life says how the call
ends. So a life decides what is ready when, and after each event the thread is at rest.

Over 400 lines: the machine, its account and its faults read as one.

Legend: N ranks, C slots per rank, E experts, M microbatches.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
)

from megatron_laer.arrays import Int64
from megatron_laer.planner import service as services_of
from megatron_laer.planner.forecast import WINDOW, WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan, PlannerService
from megatron_laer.planner.state import PlannerState
from tests.sequences import Life, find, fitting, rewritten, run_lives

STEPS_BY_DAY, STEPS_AT_NIGHT = 600, 10_000

N, C, E = 4, 2, 4
GEOMETRY = Geometry(N, E, C, node_size=2)
INITIAL = ExpertLayout.static(N, C, E)
OPEN_STEPS = 4

Layouts = tuple[ExpertLayout, ...]

# Ends of a strategy's call. All but the first keep the layer's layout, with this warning.
GOOD, DIES = "good", "dies"
WARNINGS = {
    "raises": "raised OSError: no plan; the layer keeps its layout",
    "nothing": "returned NoneType, not an ExpertLayout",
    "wrong type": "returned bytes, not an ExpertLayout",
    "wrong shape": "experts) = (4, 3, 4), expected (4, 2, 4)",
    "wrong number of experts": "experts) = (4, 2, 8), expected (4, 2, 4)",
    "illegal": "empty slots, which only --fsep-sharding experts",
    DIES: "the planner's thread is dead; layouts stay as they are",
}
RESULTS = {
    "nothing": None,
    "wrong type": INITIAL.slot_bytes,
    "wrong shape": ExpertLayout.static(N, C + 1, E),
    "wrong number of experts": ExpertLayout.static(N, C, 2 * E),
    "illegal": ExpertLayout.at_home(N, C, E),
}


def layout_of(layer: int, expected: int, current: ExpertLayout) -> ExpertLayout:
    """Return a layout that shows all it was made from."""
    return ExpertLayout.random(N, C, E, (layer, expected, zlib.crc32(current.slot_bytes)))


class Call(NamedTuple):
    """Call of a layer's strategy: with a forecast of the same number everywhere, and a layout."""

    layer: int
    expected: int
    current: ExpertLayout


class Gate:
    """Strategies of all layers, and the one view of whether the service's thread is at rest."""

    def __init__(self, patience_s: float) -> None:
        self.calls: list[Call] = []
        self.while_waiting: Callable[[], None] | None = None
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._ends: deque[str] = deque()
        self._is_inside = self._is_idle = False

    def strategy(self, layer: int) -> Any:
        return SimpleNamespace(name="scripted", plan=lambda *of: self._plan(layer, *of))

    def release(self, *ends: str) -> None:
        with self._changed:
            self._ends.extend(ends)
            self._changed.notify_all()

    def wait_for_rest(self) -> None:
        """Wait until the thread has no work, or is in a call that nothing releases."""
        with self._changed:
            is_at_rest = self._changed.wait_for(
                lambda: self._is_idle or (self._is_inside and not self._ends), self._patience_s
            )
        assert is_at_rest, "the thread does not come to rest"

    def idle(self, is_idle: bool) -> None:
        with self._changed:
            self._is_idle = is_idle
            self._changed.notify_all()

    def _plan(self, layer: int, counts_NE: Int64, current: ExpertLayout) -> object:
        expected = int(counts_NE[0, 0])
        assert (counts_NE == expected).all()
        self.calls.append(Call(layer, expected, current))
        with self._changed:
            self._is_inside = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._ends, self._patience_s)
            end = self._ends.popleft()
            self._is_inside = False
        if end == "raises":
            raise OSError("no plan")
        if end == DIES:
            raise SystemExit
        return layout_of(layer, expected, current) if end == GOOD else RESULTS[end]


class Watched(threading.Condition):
    """Condition of the service that shows the gate when the thread has no work.

    Its other waits are those of training, which the life has to expect.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self._training = threading.get_ident()

    def wait(self, timeout: float | None = None) -> bool:
        if threading.get_ident() != self._training:
            self._gate.idle(True)
        elif timeout:
            assert self._gate.while_waiting is not None, "training waits"
            self._gate.while_waiting()
        return super().wait(timeout)

    def notify_all(self) -> None:
        self._gate.idle(False)
        super().notify_all()


@dataclass
class Step:
    """Account of a step: layers whose counts came, wait to be planned, and are planned."""

    is_dropped: bool
    came: set[int] = field(default_factory=set)
    waiting: dict[int, tuple[int, ...]] = field(default_factory=dict)
    made: dict[int, ExpertLayout] = field(default_factory=dict)
    plan: Layouts | None = None
    plan_ms: float | None = None

    @property
    def is_open(self) -> bool:
        return self.plan is None and not self.is_dropped


@dataclass
class Account:
    """Plain model of a service, as its docstrings describe it.

    Attributes:
        seen: counts that each layer's forecast has observed.
        job: step and call in the strategy, from which `finish` gets the thread on.
    """

    lag: int
    waits: bool
    good: list[ExpertLayout]
    seen: list[tuple[int, ...]]
    steps: dict[int, Step] = field(default_factory=dict)
    job: tuple[int, Call] | None = None
    calls: list[Call] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: int = 0
    late: int = 0
    full: int = -1
    asked: int = -1
    is_dead: bool = False
    is_closed: bool = False

    def load(self, plans: Sequence[Plan]) -> None:
        layers = range(len(self.good))
        for plan in plans:
            step = Step(False, {*layers}, plan=plan.layouts, plan_ms=plan.plan_ms)
            self.steps[plan.source_step] = step
            self.good, self.full = [*plan.layouts], plan.source_step

    # Training's side.

    def submit(self, at: int, layer: int, counts: tuple[int, ...]) -> None:
        if self.is_closed or at <= self.asked:
            return
        step = self.steps.setdefault(at, Step(is_dropped=at <= self.full))
        is_first = layer not in step.came
        step.came.add(layer)
        may_replace = layer in step.waiting and not self.waits
        if step.is_open and not self.is_dead and (is_first or may_replace):
            step.waiting[layer] = counts
        if self.is_full(step):
            self.full = max(self.full, at)
            for before in sorted(self.steps):
                if before < at:
                    self._pass_over(before)
        if not self.waits:
            for oldest in sorted(at for at in self.steps if self.steps[at].is_open)[:-OPEN_STEPS]:
                self._drop(oldest)
        self.go_on()

    def _pass_over(self, at: int) -> None:
        """Account for a step that is older than a full one."""
        step = self.steps[at]
        if not step.is_open:
            return
        if not self.is_full(step):
            missing = sorted({*range(len(self.good))} - step.came)
            self._warn(f"counts of step {at} never came for layers {missing}")
            self._drop(at)
        elif not self.waits and step.waiting.keys() == step.came:
            self._drop(at)

    def _drop(self, at: int) -> None:
        self.steps[at].is_dropped = True
        self.steps[at].waiting.clear()

    def lacks(self, step: int) -> bool:
        """Return whether training waits for a step's plan that can still come."""
        source = self.steps.get(step - self.lag)
        is_asked_first = step - self.lag > self.asked
        if source is None or not self.is_full(source) or not is_asked_first:
            return False
        return self.waits and source.is_open and not self.is_closed and not self.is_dead

    def due(self, step: int) -> Step | None:
        """Return the step whose plan takes effect."""
        at = step - self.lag
        source = self.steps.get(at)
        is_expected = at > self.asked and source is not None and self.is_full(source)
        self.asked = max(self.asked, at)
        if self.waits:
            candidates = [at] if is_expected else []
        else:
            candidates = [of for of in self.steps if of <= at]
        newest = max((of for of in candidates if self.steps[of].plan), default=None)
        if is_expected and newest != at:
            self.late += 1
            if self.waits:
                self._warn(self._why_missing(at, self.steps[at]))
                self.stop_waiting()
            elif self.late == 1:
                self._warn(f"the plan from step {at} was not ready at step {step}, which")
        if newest is None:
            return None
        found = self.steps[newest]
        # Neither it nor an older one takes effect again.
        self.steps = {of: one for of, one in self.steps.items() if of > newest}
        return found

    def _why_missing(self, at: int, step: Step) -> str:
        if self.is_closed:
            return "the planner is closed; layouts stay as they are"
        if self.is_dead:
            return "the planner's thread is dead; layouts stay as they are"
        if step.is_dropped:
            return f"step {at} was dropped by the planner"
        return f"the plan of step {at} was not complete after 0.0 s; layouts stay as they are"

    def stop_waiting(self) -> None:
        self.waits = False
        self._warn("from here on late plans are not waited for")

    @property
    def is_busy(self) -> bool:
        is_working = not self.is_dead and not self.is_closed
        return is_working and any(of.is_open and self.is_full(of) for of in self.steps.values())

    @property
    def plans(self) -> list[tuple[int, Layouts]]:
        return [(at, step.plan) for at, step in sorted(self.steps.items()) if step.plan]

    def is_full(self, step: Step) -> bool:
        return len(step.came) == len(self.good)

    def close(self) -> None:
        self.is_closed = True
        for at, step in self.steps.items():
            if step.is_open:
                self._drop(at)

    # The thread's side.

    @property
    def has_thread(self) -> bool:
        return not self.is_dead and (not self.is_closed or self.job is not None)

    def go_on(self) -> None:
        """Enter the strategy of the next layer, if there is one."""
        opened = [at for at, step in self.steps.items() if step.is_open]
        if self.job or self.is_dead or self.is_closed or not opened:
            return
        at = min(opened)
        if waiting := self.steps[at].waiting:
            layer = next(iter(waiting))
            self.seen[layer] = (*self.seen[layer], *waiting.pop(layer))[-WINDOW:]
            call = Call(layer, sum(self.seen[layer]), self.good[layer])
            self.job = at, call
            self.calls.append(call)

    def finish(self, end: str) -> None:
        assert self.job is not None
        at, call = self.job
        self.job = None
        if end == DIES:
            self.is_dead = True
            if not self.is_closed:
                self._warn(WARNINGS[DIES])
            return
        if end != GOOD:
            self.failures += 1
            self._warn(WARNINGS[end])
        step = self.steps.get(at)
        if step is not None and step.is_open:
            step.made[call.layer] = layout_of(*call) if end == GOOD else call.current
            if len(step.made) == len(self.good):
                self.good = [step.made[layer] for layer in range(len(self.good))]
                step.plan = tuple(self.good)
        self.go_on()

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


class Saved(NamedTuple):
    """State in a checkpoint, and the account that a service goes on with."""

    next_step: int
    content: bytes
    seen: list[tuple[int, ...]]
    plans: list[tuple[int, Layouts]]
    in_force: Layouts


ENDS = st.sampled_from([*[GOOD] * 8, *WARNINGS])
MANY_ENDS = st.lists(ENDS, min_size=1, max_size=4)


class ServiceLives(Life):
    """Machine of a run's services, one after the other, as its planner rank drives them.

    `waits` is drawn for each service if it is None.
    """

    patience_s: ClassVar[float] = 300.0
    waits: ClassVar[bool | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.service: PlannerService | None = None
        self.is_sound = False

    @initialize(
        layers=st.integers(1, 3), lag=st.integers(1, 3), waits=st.booleans(), says=st.booleans()
    )
    def begin(self, layers: int, lag: int, waits: bool, says: bool) -> None:
        self.layers = layers
        self.says = says
        self.values = itertools.count(1)
        self.now, self.in_force = -1, (INITIAL,) * layers
        self.saved: list[Saved] = []
        self._start(lag, waits, [()] * layers, ())
        self.is_sound = True

    def step(self) -> None:
        super().step()
        self.is_sound = False

    def _start(
        self, lag: int, waits: bool, seen: Sequence[tuple[int, ...]], plans: Sequence[Plan]
    ) -> None:
        self.gate = Gate(self.patience_s)
        self.warnings: list[str] = []
        waits = waits if self.waits is None else self.waits
        self.account = Account(lag, waits, [*self.in_force], [*seen])
        self.account.load(plans)
        before = {*threading.enumerate()}
        watched = SimpleNamespace(Condition=lambda: Watched(self.gate), Thread=threading.Thread)
        with mock.patch.object(services_of, "threading", watched):
            self.service = PlannerService(
                [self.gate.strategy(layer) for layer in range(self.layers)],
                self.in_force,
                [WindowForecast(tuple(map(counts_of, of))) for of in seen],
                lag=lag,
                waits=waits,
                on_warning=self._on_warning,
                plans=plans,
                check_layout=GEOMETRY.check_layout,
            )
        (self.thread,) = {*threading.enumerate()} - before
        self._wait_for_rest()

    def _on_warning(self, message: str) -> None:
        self.warnings.append(message)
        if not self.says:
            raise OSError("disk full")

    def _wait_for_rest(self) -> None:
        if self.account.has_thread:
            self.gate.wait_for_rest()
        else:
            self.thread.join(self.patience_s)

    @contextmanager
    def _time_out(self, ends: Sequence[str], lacks: Callable[[], bool]) -> Iterator[None]:
        """Let training wait while the planner's calls end so; without `ends`, not at all."""
        given: list[str] = []
        for end in itertools.cycle(ends or [GOOD]):
            if not (ends and self.account.job and lacks()):
                break
            self.account.finish(end)
            given.append(end)

        def release() -> None:
            self.gate.release(*given)
            given.clear()

        seconds = self.patience_s if given else 0.0
        self.gate.while_waiting = release if given else None
        with (
            mock.patch.object(services_of, "WAIT_TIMEOUT_S", seconds),
            mock.patch.object(services_of, "PLANS_TIMEOUT_S", seconds),
        ):
            yield
        assert not given, "training does not wait"
        self.gate.while_waiting = None

    @rule(
        advance=st.sampled_from([1, 1, 1, 1, 1, 0, 2, 9]),
        ends=st.one_of(st.just([]), MANY_ENDS, MANY_ENDS),
    )
    def begin_step(self, advance: int, ends: list[str]) -> None:
        """Begin a step, or repeat it; where plans are waited for, their layers' calls end so."""
        self.step()
        self.now += advance if self.now >= 0 else 1
        assert self.service is not None
        account = self.account
        with self._time_out(ends, lambda: account.lacks(self.now)):
            expected = account.due(self.now)
            found = self.service.due(self.now)
        assert found == (None if expected is None else expected.plan)
        if found is not None and expected is not None:
            self.in_force = found
            if expected.plan_ms is not None:
                assert self.service.plan_ms == expected.plan_ms

    @precondition(lambda self: self.now >= 0)
    @rule(
        first=st.integers(0, 2),
        microbatches=st.integers(0, 3),
        age=st.sampled_from([0, 0, 0, 0, 1, 2]),
        number=st.sampled_from([3, 3, 3, 1, 2, 4, 6]),
    )
    def observe(self, first: int, microbatches: int, age: int, number: int) -> None:
        """Submit counts of some layers or all, some of them again; without or of microbatches."""
        for layer in range(first, first + number):
            self.step()
            self._submit(max(self.now - age, 0), layer % self.layers, microbatches)

    @rule(
        number=st.integers(2, 6),
        first=st.integers(0, 2),
        layers=st.sampled_from([3, 3, 1]),
        ends=st.one_of(st.just([]), MANY_ENDS),
    )
    def train(self, number: int, first: int, layers: int, ends: list[str]) -> None:
        """Begin some steps, and submit the counts of some layers, or all."""
        for _ in range(number):
            self.begin_step(1, ends)
            self.observe(first, 0, 0, min(layers, self.layers))

    def _submit(self, at: int, layer: int, microbatches: int) -> None:
        assert self.service is not None
        counts = tuple(itertools.islice(self.values, max(microbatches, 1)))
        counts_MNE = np.stack([counts_of(value) for value in counts])
        self.service.submit(at, layer, counts_MNE if microbatches else counts_MNE[0])
        self.account.submit(at, layer, counts)
        self._wait_for_rest()

    @precondition(lambda self: self.now >= 0)
    @rule(layer=st.integers(0, 2), shape=st.sampled_from([(E,), (N, E + 1), (2, E, N + 1)]))
    def observe_other_shape(self, layer: int, shape: tuple[int, ...]) -> None:
        self.step()
        assert self.service is not None
        with pytest.raises(ValueError, match="expected"):
            self.service.submit(self.now, layer % self.layers, np.ones(shape, dtype=np.int64))

    @precondition(lambda self: self.account.job)
    @rule(ends=MANY_ENDS)
    def planner_goes_on(self, ends: list[str]) -> None:
        """End the strategy's call, and some that follow."""
        for end in ends:
            if self.account.job:
                self.step()
                self.account.finish(end)
                self.gate.release(end)
                self._wait_for_rest()

    @precondition(lambda self: len(self.saved) < 9)
    @rule(ends=st.one_of(st.just([]), MANY_ENDS))
    def save(self, ends: list[str]) -> None:
        """Save the state, with the plans for which the checkpoint waits."""
        self.step()
        assert self.service is not None
        account = self.account
        with self._time_out(ends, lambda: account.is_busy):
            state = self.service.state()
        if account.waits and account.is_busy:
            account.stop_waiting()
        assert state.caught_up == (not account.is_busy)
        assert [values_of(forecast.kept) for forecast in state.forecasts] == account.seen
        assert [(plan.source_step, plan.layouts) for plan in state.plans] == account.plans
        content = PlannerState(
            next_step=self.now + 1,
            version=len(self.saved),
            layers=tuple(f"layer {layer}" for layer in range(self.layers)),
            layouts=self.in_force,
            forecasts=state.forecasts,
            plans=state.plans,
        ).to_bytes()
        plain = [*account.seen], account.plans, self.in_force
        self.saved.append(Saved(self.now + 1, content, *plain))

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 8), lag=st.integers(1, 3), waits=st.booleans())
    def load(self, which: int, lag: int, waits: bool) -> None:
        """End the service, and go on from one of the checkpoints with a new one."""
        self.step()
        self._end()
        saved = self.saved[which % len(self.saved)]
        state = PlannerState.from_bytes(saved.content)
        self.now, self.in_force = saved.next_step - 1, state.layouts
        assert state.next_step == saved.next_step and state.layouts == saved.in_force
        assert [values_of(forecast.kept) for forecast in state.forecasts] == saved.seen
        assert [(plan.source_step, plan.layouts) for plan in state.plans] == saved.plans
        self._start(lag, waits, saved.seen, state.plans)

    @precondition(lambda self: self.account.calls)
    @rule(chance=st.integers(0, 3))
    def close(self, chance: int) -> None:
        """Close a service, rarely; training may still call it."""
        if chance == 0:
            self.step()
            self._close()

    def _close(self) -> None:
        account = self.account
        assert self.service is not None
        account.close()
        assert self.service.close(0.0 if account.has_thread else self.patience_s) == (
            not account.has_thread
        )

    def _end(self) -> None:
        """Close the service, whose thread ends with the call that it is in."""
        self._close()
        if self.account.job:
            self.account.finish("raises")
            self.gate.release("raises")
        self.thread.join(self.patience_s)
        assert not self.thread.is_alive(), "a thread is left"
        self.service_agrees_with_its_account()

    @invariant()
    def service_agrees_with_its_account(self) -> None:
        if self.service is None:
            return
        account = self.account
        self._wait_for_rest()
        assert self.thread.is_alive() == account.has_thread
        assert self.gate.calls == account.calls
        assert self.service.failures == account.failures
        assert self.service.late_plans == account.late
        # The thread and training warn in any order.
        for text in account.warnings:
            assert sum(text in message for message in self.warnings) == 1, text
        assert len(self.warnings) == len(account.warnings), self.warnings
        self.is_sound = True

    def teardown(self) -> None:
        if self.service is None:
            return
        if self.is_sound:
            self._end()
        else:  # a failed one, which has its message
            self.service.close(0.0)
            self.gate.release(*["raises"] * 99)


def counts_of(value: int) -> Int64:
    counts_NE = np.full((N, E), value, dtype=np.int64)
    counts_NE.setflags(write=False)
    return counts_NE


def values_of(kept: Sequence[Int64]) -> tuple[int, ...]:
    """Return the number that each of a forecast's counts has everywhere."""
    (values,) = {tuple(int(of[n, e]) for of in kept) for n in range(N) for e in range(E)}
    return values


# The thread ends with an exception in some lives, which pytest would report.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def test_random_lives_of_a_service_agree_with_a_plain_account() -> None:
    run_lives(ServiceLives, STEPS_BY_DAY)


@pytest.mark.nightly
def test_many_random_lives_of_a_service_agree_with_a_plain_account() -> None:
    run_lives(ServiceLives, STEPS_AT_NIGHT)


# Deliberate faults of state, which these lives find.


@dataclass(frozen=True)
class Fault:
    """Deliberate fault: in the source of a method, wrong text takes the place of right text.

    Attributes:
        lives: attributes of lives in which it can show, so that it is found soon.
    """

    name: str
    method: Callable[..., Any]
    right: str
    wrong: str
    lives: Mapping[str, Any] = field(default_factory=dict)

    def planted(self) -> Any:
        return rewritten(self.method, self.right, self.wrong)


# A strategy's or file's error is a wrong life too.
FAILURES = (AssertionError, OSError, ValueError, pytest.fail.Exception)

_S = PlannerService
FAULTS = (
    Fault(
        "the oldest open step stays",
        _S._drop_oldest,
        "steps[:-_OPEN_STEPS]",
        "steps[: -_OPEN_STEPS - 1]",
    ),
    Fault(
        "the newest step is planned first",
        _S._next_job,
        "min((at for",
        "max((at for",
    ),
    Fault(
        "a step that lacks layers holds up later ones",
        _S._drop_before,
        "entry.drop()\n        elif",
        "pass\n        elif",
    ),
    Fault(
        "a step that is being planned is dropped",
        _S._drop_before,
        "and not entry.is_started",
        "",
    ),
    Fault(
        "steps are dropped where plans are waited for",
        _S._drop_before,
        "not self._waits and not",
        "not",
    ),
    Fault(
        "later counts of a layer replace those that are waited for",
        _S.submit,
        "is_planned and not self._waits and",
        "is_planned and",
        {"waits": True},
    ),
    Fault(
        "planned counts of a layer are planned again",
        _S.submit,
        "self._waits and entry.counts[layer] is not None",
        "self._waits",
    ),
    Fault(
        "outdated counts are planned",
        _S.submit,
        "_Step(is_dropped=step <= self._full_step)",
        "_Step()",
    ),
    Fault(
        "a plan is due before its lag has passed",
        _S.due,
        "if at <= source_step and of.plan",
        "if of.plan",
    ),
    Fault(
        "an older plan takes effect where plans are waited for",
        _S.due,
        "if not self._waits:",
        "if True:",
    ),
    Fault(
        "a plan takes effect twice",
        _S._forget,
        "at > last and not of.is_dropped",
        "not of.is_dropped",
    ),
    Fault(
        "a late plan is waited for again",
        _S._stop_waiting,
        "self._waits = False",
        "pass",
    ),
    Fault(
        "a late plan counts twice",
        _S.due,
        "source_step > self._asked_step and entry is not None",
        "entry is not None",
    ),
    Fault(
        "a failing layer gets its first layout",
        _S._next_job,
        "self._good[layer]",
        "ExpertLayout.static(*self._good[layer].shape)",
    ),
    Fault(
        "forecasts forget",
        _S._plan_layer,
        "self._forecasts[layer] = forecast",
        "pass",
    ),
    Fault(
        "illegal layouts pass",
        _S._plan_layer,
        "self._check_layout(layout)",
        "pass",
    ),
    Fault(
        "layouts of another geometry pass",
        _S._plan_layer,
        "layout.shape != current.shape",
        "layout.capacity != current.capacity",
    ),
    Fault(
        "an error of the strategy ends the thread",
        _S._plan_layer,
        "except Exception",
        "except ValueError",
    ),
    Fault(
        "an error of the logger reaches training",
        _S._warn,
        "except Exception",
        "except ValueError",
    ),
    Fault(
        "a cause is warned of again",
        _S._warn,
        "if is_new:",
        "if True:",
    ),
    Fault(
        "nothing wakes training when the thread dies",
        _S._run,
        "self._alive = False",
        "pass",
    ),
    Fault(
        "a closed service goes on planning",
        _S._next_job,
        "while not self._closing:",
        "while True:",
    ),
    Fault(
        "a state lacks its older plans",
        _S.state,
        "if of.plan)",
        "if of.plan)[-1:]",
    ),
    Fault(
        "a state does not wait for the thread",
        _S.state,
        "self._changed.wait_for(is_caught_up, timeout_s)",
        "is_caught_up()",
    ),
    Fault(
        "a loaded service starts from the layouts in force",
        _S.__init__,
        "plans[-1].layouts if plans else initial",
        "initial",
    ),
    Fault(
        "a loaded service starts from the oldest plan",
        _S.__init__,
        "plans[-1]",
        "plans[0]",
    ),
    Fault(
        "a loaded service plans steps again",
        _S.__init__,
        "max(self._ledger, default=-1)",
        "-1",
    ),
    Fault(
        "a loaded service has no plans",
        _S.__init__,
        "for plan in plans}",
        "for plan in plans[:0]}",
    ),
)


@pytest.mark.parametrize("fault", fitting(FAULTS))
def test_deliberate_faults_of_state_are_found(fault: Fault) -> None:
    """Expect a life to fail; one in which a thread or training hangs fails after some time."""
    lives = type("Lives", (ServiceLives,), {"patience_s": 0.3, **fault.lives})
    find(lives, fault.planted(), FAILURES)
