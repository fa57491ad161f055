"""Runs with all recordings that die at any moment and are restarted end as if undisturbed.

One dies before its first checkpoint; the night's others are drawn from a seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.checks import cut_from, problems
from tests.chaos.job import run_job
from tests.chaos.plans import SAVE_EVERY, VARIANTS, Fault, Plan
from tests.chaos.runs import chaos

RUNS = 40


@pytest.mark.counts(fault_runs=1)
def test_a_run_killed_before_its_first_checkpoint_goes_on_by_itself(
    text_data: str, tmp_path: Path
) -> None:
    steps = SAVE_EVERY + 1
    killed = Fault("KILL all", 0, SAVE_EVERY - 1, 0.0, is_awaited=True)
    whole = run_job(Plan(VARIANTS[0], False, (), steps), text_data, tmp_path / "whole")
    assert not whole.problem
    plan = Plan(VARIANTS[0], False, (killed,), steps)
    outcome = run_job(plan, text_data, tmp_path / "killed")
    assert problems(plan, outcome, whole.folder) == []
    assert outcome.starts == [f"{SAVE_EVERY - 1}:-9,-9", f"{steps}:0,0"]
    assert cut_from(outcome.folder) == [0]


@pytest.mark.nightly
@pytest.mark.counts(fault_runs=RUNS)
def test_random_faults_change_no_digit_and_leave_nothing_behind(
    text_data: str, tmp_path: Path
) -> None:
    assert chaos(RUNS, 40, text_data, tmp_path) == []
