"""Runs with all recordings that die at any moment and are restarted end as if undisturbed.

Each day a job is killed before its first checkpoint, loses a rank in a step, and is told to end. At
night others are drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.chaos.checks import cut_from, problems
from tests.chaos.job import run_job
from tests.chaos.plans import SAVE_EVERY, Fault, Plan, Variant, plans
from tests.checkpoints import NEEDS_NVRX

RUNS, SEED = 40, 58


@pytest.mark.parametrize("strategy", ["mcore", pytest.param("nvrx", marks=NEEDS_NVRX)])
def test_a_job_that_is_killed_and_stopped_ends_bitwise_as_one_that_was_not(
    text_data: str, tmp_path: Path, strategy: str
) -> None:
    """Loader workers and asynchronous saves give each rank helpers, which must end with it."""
    saves = f"--async-save --use-persistent-ckpt-worker --async-strategy {strategy}"
    plain = Variant("plain", "--fsep-planner greedy")
    with_helpers = Variant("helpers", f"{plain.flags} --num-workers 2 {saves}")
    stopped = 2 * SAVE_EVERY + 1
    faults = (
        Fault("KILL all", 0, SAVE_EVERY - 1, 0.0, is_awaited=True),
        Fault("KILL one", 1, SAVE_EVERY + 2, 0.0, is_awaited=True),
        Fault("TERM all", 0, stopped, 0.0, is_awaited=True),
    )
    plan = Plan(with_helpers, "SIGTERM", faults, stopped + 1)
    whole = run_job(Plan(plain, "", (), plan.steps), text_data, tmp_path / "whole")
    assert not whole.problem
    outcome = run_job(plan, text_data, tmp_path / "stopped")
    assert problems(plan, outcome, whole.folder) == []
    all_killed, one_killed, ended, last = outcome.starts
    assert all_killed == f"{SAVE_EVERY - 1}:-9,-9" and one_killed.endswith(",-9")
    assert [ended, last] == [f"{stopped}:0,0", f"{plan.steps}:0,0"]
    assert cut_from(outcome.folder)[0] == 0


@pytest.fixture(scope="module")
def undisturbed(
    text_data: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Variant], Path]:
    """Return the folder of a run of a kind without faults, which many compare with."""

    def run(variant: Variant) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        outcome = run_job(Plan(variant, "", ()), text_data, folder)
        assert not outcome.problem, outcome
        return folder

    return cache(run)


@pytest.mark.nightly
@pytest.mark.parametrize("plan", [*plans(RUNS, SEED)], ids=map(str, range(RUNS)))
def test_random_faults_change_no_digit_and_leave_nothing_behind(
    undisturbed: Callable[[Variant], Path], text_data: str, tmp_path: Path, plan: Plan
) -> None:
    expected = undisturbed(plan.variant)
    outcome = run_job(plan, text_data, tmp_path / "run")
    faults, starts = "; ".join(map(str, plan.faults)), ", ".join(outcome.starts)
    print(f"\n{plan.variant.name} | {faults} | {starts} | cut from {cut_from(outcome.folder)}")
    assert problems(plan, outcome, expected) == []
