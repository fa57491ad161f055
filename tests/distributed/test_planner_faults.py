"""A slow or wrong planner changes speed, never correctness.

That plans held back change no bit under `--fsep-late-plan wait` is in `test_stress.py`.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.cpu.training import Record, train
from megatron_laer.planner import service
from megatron_laer.planner.layout import ExpertLayout
from tests.distributed.conftest import Trainings
from tests.faults.injected import current_step
from tests.parity.compare import identical
from tests.parity.row import FSEP
from tests.probes import running

LAER = FSEP + " --fsep-planner laer --fsep-set cluster=cpu-gloo"
STEPS = 10
# Plans before a planner stops: of two layers for four steps.
WELL = 2 * 4

_draws = random.Random(5)


def _is_slow(_call: int, _current: ExpertLayout) -> None:
    """Hold a third of the plans until the next step has begun, so that they are late anywhere."""
    step, polls = current_step(), 1000 if _draws.random() < 0.3 else 0
    while polls and current_step() == step:
        polls -= 1
        time.sleep(0.005)


def _hangs(call: int, _current: ExpertLayout) -> None:
    if call >= WELL:
        service.WAIT_TIMEOUT_S = 1.0  # plans before have the usual time
        threading.Event().wait()


def _dies(call: int, _current: ExpertLayout) -> None:
    if call >= WELL:
        raise SystemExit("the planner's thread ends")


def _keeps(call: int, current: ExpertLayout) -> ExpertLayout | None:
    """Leave the layouts in force that a planner leaves which stops here."""
    return current if call >= WELL else None


def _is_broken(call: int, _current: ExpertLayout) -> ExpertLayout | None:
    if call % 4 == 1:
        raise RuntimeError("planner is ill")
    return ExpertLayout.static(2, 8, 16) if call % 2 else None


# By the number of the call and the layout in force: a layout, or None to plan as usual.
Fault = Callable[[int, ExpertLayout], ExpertLayout | None]


def planner_state(_model: object) -> tuple[int, int, int]:
    coordinator = running()
    status = coordinator.layouts.status
    return coordinator.layouts.version, status.late_plans, status.failures


def train_with_planner(command: list[str], fault: Fault) -> tuple[Record, int]:
    """Train with a faulty planner; also count the vain waits for it."""
    from megatron_laer.planner.laer import LaerStrategy
    from megatron_laer.planner.service import PlannerService

    plan, calls = LaerStrategy.plan, itertools.count()
    wait, given_up = PlannerService._wait_for, 0

    def faulty(self: Any, counts_NE: np.ndarray, current: ExpertLayout) -> Any:
        planned = fault(next(calls), current)
        return plan(self, counts_NE, current) if planned is None else planned

    def waiting(self: Any, *args: Any) -> Any:
        nonlocal given_up
        problem = wait(self, *args)
        given_up += problem is not None
        return problem

    with (
        mock.patch.object(LaerStrategy, "plan", faulty),
        mock.patch.object(PlannerService, "_wait_for", waiting),
        mock.patch.object(service, "WAIT_TIMEOUT_S", service.WAIT_TIMEOUT_S),
    ):
        record = train(command, planner_state)
    return record, given_up


def test_a_randomly_slow_planner_never_stops_training(trained: Trainings) -> None:
    steps = 40
    options = {"by": train_with_planner, "steps": steps, "global_batch": 4}
    (record, _), (other, _) = trained.each(LAER, _is_slow, **options)
    versions = [state[0] for state in record.probes]
    assert versions == [state[0] for state in other.probes], "ranks change layouts at one step"
    late = record.probes[-1][1]
    assert len(record.losses) == steps
    assert 0 < versions[-1] < steps - 1 and late > 0


@pytest.mark.parametrize(("fault", "late"), [(_hangs, "keep"), (_hangs, "wait"), (_dies, "keep")])
def test_a_planner_that_stops_leaves_its_last_layouts_in_force(
    trained: Trainings, fault: Fault, late: str
) -> None:
    flags, options = f"{LAER} --fsep-late-plan {late}", {"by": train_with_planner, "steps": STEPS}
    (stopped, given_up), (_, of_other_rank) = trained.each(flags, fault, **options)
    assert len(stopped.losses) == STEPS
    assert (given_up, of_other_rank) == (late == "wait", 0)
    version = stopped.probes[-1][0]
    assert 0 < version <= 4 and stopped.probes[-3][0] == version, "the planner did not stop"
    if late == "wait":
        kept, _ = trained(flags, _keeps, **options)
        assert identical(stopped, kept)


def test_a_broken_planner_keeps_the_last_good_layout(trained: Trainings) -> None:
    flags = f"{LAER} --fsep-late-plan wait"
    for record, _ in trained.each(flags, _is_broken, by=train_with_planner, steps=STEPS):
        assert len(record.losses) == STEPS
        version, _, failures = record.probes[-1]
        assert version == failures == STEPS - 1
