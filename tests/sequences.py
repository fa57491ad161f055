"""Long random lives of an object, by hypothesis' rule machines: some by day, many by night.

A machine compares the object with a plain oracle after each step. Hypothesis shrinks a sequence
that fails, prints it as code, and tries it first in the next run (`.hypothesis`).
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.planted.faults import MisfitError

STEPS_OF_A_LIFE = 50


class Life(RuleBasedStateMachine):
    """Machine that counts its steps in `steps`: rules call `step()` first."""

    steps = 0

    def step(self) -> None:
        type(self).steps += 1


def run_lives(machine: type[Life], steps: int) -> None:
    """Run lives until their rules were called this often."""
    machine.steps = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=2 * -(-steps // STEPS_OF_A_LIFE) + 2,
            stateful_step_count=STEPS_OF_A_LIFE,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.steps >= steps, f"{machine.steps} steps of {steps}"


def rewritten(method: Callable[..., Any], right: str, wrong: str) -> Any:
    """Return a patch of a method in whose source wrong text takes the place of right text.

    Raises MisfitError if the right text is not there once.
    """
    owner, _, name = method.__qualname__.rpartition(".")
    module = sys.modules[method.__module__]
    made: dict[str, Any] = {}
    source = textwrap.dedent(inspect.getsource(method))
    if source.count(right) != 1:
        raise MisfitError(method.__qualname__, repr(right))
    exec(source.replace(right, wrong), vars(module), made)
    return mock.patch.object(getattr(module, owner) if owner else module, name, made[name])


def fitting(faults: Sequence[Any]) -> list[Any]:
    """Return parameters of the faults that can be planted; `test_planted.py` names the others."""
    return [pytest.param(fault, id=fault.name) for fault in faults if misfit(fault) is None]


def misfit(fault: Any) -> MisfitError | None:
    try:
        with fault.planted():
            return None
    except MisfitError as error:
        return error


def find(
    machine: type[Life],
    planted: AbstractContextManager[object],
    failures: tuple[type[BaseException], ...] = (AssertionError,),
) -> None:
    """Expect a life to fail with a deliberate fault: hypothesis stops at the first that does.

    It runs that life once more; one of several threads may then end otherwise (`Flaky`).
    """
    until_found = settings(
        max_examples=4000,
        stateful_step_count=STEPS_OF_A_LIFE,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with planted, pytest.raises((*failures, Flaky)):
        run_state_machine_as_test(machine, settings=until_found)
