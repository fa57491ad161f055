"""A slow or wrong planner changes speed, never correctness."""

from __future__ import annotations

import random
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner import service
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import HOMES

FSEP = (
    " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner laer"
    " --fsep-set cluster=cpu-gloo"
)
NOT_AT_HOME = "not at home"


def flags(data: str, steps: int, extra: str = "") -> list[str]:
    return command_line(data, FSEP + extra, steps=steps)


def planner_state(model: object) -> tuple[int, int, int]:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    assert coordinator is not None
    status = coordinator.layouts.status
    return coordinator.layouts.version, status.late_plans, status.failures


def train_with_slow_planner(command: list[str], longest_s: float) -> Record:
    from megatron_laer.planner.laer import LaerStrategy

    plan = LaerStrategy.plan
    clock = random.Random(5)

    def slow(self: Any, counts_NE: np.ndarray, current: Any) -> Any:
        time.sleep(clock.uniform(0, longest_s))
        return plan(self, counts_NE, current)

    with mock.patch.object(LaerStrategy, "plan", slow):
        return train(command, planner_state)


def train_with_broken_planner(command: list[str], fault: str) -> Record:
    from megatron_laer.planner.greedy import GreedyStrategy
    from megatron_laer.planner.laer import LaerStrategy
    from megatron_laer.planner.layout import ExpertLayout

    strategy = GreedyStrategy if fault == NOT_AT_HOME else LaerStrategy
    plan = strategy.plan
    calls = 0

    def broken(self: Any, counts_NE: np.ndarray, current: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2:
            return plan(self, counts_NE, current)
        if fault == "raises":
            raise RuntimeError("planner is ill")
        if fault == "no memory":
            raise MemoryError
        if fault == NOT_AT_HOME:
            slots = current.to_list()[::-1]
            return ExpertLayout.from_slots(
                current.num_ranks, current.capacity, current.num_experts, slots
            )
        return ExpertLayout.static(2, 8, 16)

    with mock.patch.object(strategy, "plan", broken):
        return train(command, planner_state)


@pytest.mark.counts(fault_runs=1)
def test_a_randomly_slow_planner_never_stops_training(ranks: RankPools, text_data: str) -> None:
    steps = 100
    results = ranks(2).run(
        train_with_slow_planner, flags(text_data, steps, " --lr 1e-4 --min-lr 1e-4"), 0.08
    )
    versions = [[state[0] for state in record.probes] for record in results]
    assert versions[0] == versions[1], "ranks must change layouts at the same steps"
    late = results[0].probes[-1][1]
    print(f"\n{steps} steps: layouts changed {versions[0][-1]} times, {late} plans were late")
    assert len(results[0].losses) == steps
    assert 0 < versions[0][-1] < steps - 1 and late > 0


@pytest.mark.counts(fault_runs=1)
def test_a_slow_planner_under_wait_changes_nothing(ranks: RankPools, text_data: str) -> None:
    command = flags(text_data, 10, " --fsep-late-plan wait")
    quick = ranks(2).run(train, command, planner_state)[0]
    slow = ranks(2).run(train_with_slow_planner, command, 0.05)[0]
    assert quick.probes[-1][0] == 9
    assert identical(quick, slow)


def train_with_dead_planner(command: list[str]) -> Record:
    from megatron_laer.planner.service import PlannerService

    def die(self: Any) -> None:
        with self._changed:
            self._alive = False
            self._changed.notify_all()

    with mock.patch.object(PlannerService, "_run", die):
        return train(command, planner_state)


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize("late", ["keep", "wait"])
def test_a_dead_planner_leaves_training_alone(ranks: RankPools, text_data: str, late: str) -> None:
    command = flags(text_data, 6, f" --fsep-late-plan {late}")
    for record in ranks(2).run(train_with_dead_planner, command):
        assert len(record.losses) == 6
        assert record.probes[-1][0] == 0


def train_with_planner_that_stops(command: list[str], fault: str, calls: int) -> tuple[Record, int]:
    """Train while the planner hangs or ends after some calls; also count the vain waits.

    Or it keeps the layouts from then on, which leaves the same ones in force.
    """
    import threading

    from megatron_laer.planner.laer import LaerStrategy
    from megatron_laer.planner.service import PlannerService

    plan = LaerStrategy.plan
    left = calls

    def stopping(self: Any, counts_NE: np.ndarray, current: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and fault == "hangs":
            threading.Event().wait()
        if left < 0 and fault == "keeps":
            return current
        if left < 0:
            raise SystemExit("the planner's thread ends")
        return plan(self, counts_NE, current)

    wait, given_up = PlannerService._wait_for, 0

    def waiting(self: Any, *args: Any) -> Any:
        nonlocal given_up
        problem = wait(self, *args)
        given_up += problem is not None
        return problem

    with (
        mock.patch.object(LaerStrategy, "plan", stopping),
        mock.patch.object(PlannerService, "_wait_for", waiting),
        mock.patch.object(service, "WAIT_TIMEOUT_S", 1.0),
    ):
        record = train(command, planner_state)
    return record, given_up


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize(
    ("fault", "late"), [("hangs", "keep"), ("hangs", "wait"), ("dies", "keep")]
)
def test_a_planner_that_stops_leaves_its_last_layouts_in_force(
    ranks: RankPools, text_data: str, fault: str, late: str
) -> None:
    steps, calls = 10, 2 * 4
    command = flags(text_data, steps, f" --fsep-late-plan {late}")
    (stopped, given_up), (_, of_other_rank) = ranks(2).run(
        train_with_planner_that_stops, command, fault, calls
    )
    assert len(stopped.losses) == steps
    assert (given_up, of_other_rank) == (late == "wait", 0)
    version = stopped.probes[-1][0]
    assert 0 < version <= 4 and stopped.probes[-3][0] == version, "the planner did not stop"
    if late == "wait":
        kept, _ = ranks(2).run(train_with_planner_that_stops, command, "keeps", calls)[0]
        assert identical(stopped, kept)


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize("fault", ["raises", "no memory", "wrong shape", NOT_AT_HOME])
def test_a_broken_planner_keeps_the_last_good_layout(
    ranks: RankPools, text_data: str, fault: str
) -> None:
    homes = " --fsep-planner greedy" + HOMES if fault == NOT_AT_HOME else ""
    command = flags(text_data, 10, " --fsep-late-plan wait" + homes)
    for record in ranks(2).run(train_with_broken_planner, command, fault):
        assert len(record.losses) == 10
        version, _, failures = record.probes[-1]
        assert version == 9 and failures == 9
