"""Long random lives of an object, by hypothesis' rule machines: some by day, many by night.

A machine compares the object with a plain oracle after each step. Hypothesis shrinks a sequence
that fails, prints it as code, and tries it first in the next run (`.hypothesis`).
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

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
