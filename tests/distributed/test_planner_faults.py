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

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner import service
from megatron_laer.planner.layout import ExpertLayout
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.probes import running

FSEP = (
    " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner laer"
    " --fsep-set cluster=cpu-gloo"
)
# Plans before a planner stops: of two layers for four steps.
WELL = 2 * 4

_clock = random.Random(5)


def _is_slow(_call: int, _current: ExpertLayout) -> None:
    time.sleep(_clock.uniform(0, 0.08))


def _hangs(call: int, _current: ExpertLayout) -> None:
    if call >= WELL:
        threading.Event().wait()


def _dies(call: int, _current: ExpertLayout) -> None:
    if call >= WELL:
        raise SystemExit("the planner's thread ends")


def _keeps(call: int, current: ExpertLayout) -> ExpertLayout | None:
    """Leave the layouts in force that a planner leaves which stops here."""
    return current if call >= WELL else None


def _raises(call: int, _current: ExpertLayout) -> None:
    if call % 2:
        raise RuntimeError("planner is ill")


def _has_a_wrong_shape(call: int, _current: ExpertLayout) -> ExpertLayout | None:
    return ExpertLayout.static(2, 8, 16) if call % 2 else None


def _is_not_at_home(call: int, current: ExpertLayout) -> ExpertLayout | None:
    shape = current.num_ranks, current.capacity, current.num_experts
    return ExpertLayout.from_slots(*shape, current.to_list()[::-1]) if call % 2 else None


# By the number of the call and the layout in force: a layout, or None to plan as usual.
Fault = Callable[[int, ExpertLayout], ExpertLayout | None]


def planner_state(_model: object) -> tuple[int, int, int]:
    coordinator = running()
    status = coordinator.layouts.status
    return coordinator.layouts.version, status.late_plans, status.failures


def train_with_planner(command: list[str], fault: Fault) -> tuple[Record, int]:
    """Train with a faulty planner; also count the vain waits for it."""
    from megatron_laer.planner.greedy import GreedyStrategy
    from megatron_laer.planner.laer import LaerStrategy
    from megatron_laer.planner.service import PlannerService

    strategy = GreedyStrategy if fault is _is_not_at_home else LaerStrategy
    plan, calls = strategy.plan, itertools.count()
    wait, given_up = PlannerService._wait_for, 0

    def faulty(self: Any, counts_NE: np.ndarray, current: ExpertLayout) -> Any:
        planned = fault(next(calls), current)
        return plan(self, counts_NE, current) if planned is None else planned

    def waiting(self: Any, *args: Any) -> Any:
        nonlocal given_up
        problem = wait(self, *args)
        given_up += problem is not None
        return problem

    timeout_s = 1.0 if fault is _hangs else service.WAIT_TIMEOUT_S
    with (
        mock.patch.object(strategy, "plan", faulty),
        mock.patch.object(PlannerService, "_wait_for", waiting),
        mock.patch.object(service, "WAIT_TIMEOUT_S", timeout_s),
    ):
        record = train(command, planner_state)
    return record, given_up


def test_a_randomly_slow_planner_never_stops_training(ranks: RankPools, text_data: str) -> None:
    steps = 100
    command = command_line(text_data, FSEP + " --lr 1e-4 --min-lr 1e-4", steps=steps)
    (record, _), (other, _) = ranks(2).run(train_with_planner, command, _is_slow)
    versions = [state[0] for state in record.probes]
    assert versions == [state[0] for state in other.probes], "ranks change layouts at one step"
    late = record.probes[-1][1]
    print(f"\n{steps} steps: layouts changed {versions[-1]} times, {late} plans were late")
    assert len(record.losses) == steps
    assert 0 < versions[-1] < steps - 1 and late > 0


@pytest.mark.parametrize(("fault", "late"), [(_hangs, "keep"), (_hangs, "wait"), (_dies, "keep")])
def test_a_planner_that_stops_leaves_its_last_layouts_in_force(
    ranks: RankPools, text_data: str, fault: Fault, late: str
) -> None:
    steps = 10
    command = command_line(text_data, f"{FSEP} --fsep-late-plan {late}", steps=steps)
    (stopped, given_up), (_, of_other_rank) = ranks(2).run(train_with_planner, command, fault)
    assert len(stopped.losses) == steps
    assert (given_up, of_other_rank) == (late == "wait", 0)
    version = stopped.probes[-1][0]
    assert 0 < version <= 4 and stopped.probes[-3][0] == version, "the planner did not stop"
    if late == "wait":
        kept, _ = ranks(2).run(train_with_planner, command, _keeps)[0]
        assert identical(stopped, kept)


@pytest.mark.parametrize("fault", [_raises, _has_a_wrong_shape, _is_not_at_home])
def test_a_broken_planner_keeps_the_last_good_layout(
    ranks: RankPools, text_data: str, fault: Fault
) -> None:
    homes = " --fsep-planner greedy" + HOMES if fault is _is_not_at_home else ""
    command = command_line(text_data, f"{FSEP} --fsep-late-plan wait{homes}", steps=10)
    for record, _ in ranks(2).run(train_with_planner, command, fault):
        assert len(record.losses) == 10
        version, _, failures = record.probes[-1]
        assert version == 9 and failures == 9
