"""A planner resumed from its saved state makes the same plans."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.runtime.planning.planned_layouts import PlannedLayouts
from tests.costs import make_costs

GEOMETRY = Geometry(num_ranks=4, num_experts=6, capacity=3, node_size=2)
SHAPE = (GEOMETRY.num_ranks, GEOMETRY.capacity, GEOMETRY.num_experts)
LAYERS = ("layer 1", "layer 2", "layer 3")
STEPS = 9


class Slow:
    """Strategy that takes time, so that plans are in progress when its state is read."""

    name = "slow"

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        time.sleep(0.01)
        return self._strategy.plan(counts_NE, current)


def planner(name: str, lag: int, resumed: PlannerState | None = None) -> PlannedLayouts:
    return PlannedLayouts(
        Slow(make_strategy(name, geometry=GEOMETRY, costs=make_costs())),
        resumed.layouts if resumed else [ExpertLayout.static(*SHAPE)] * len(LAYERS),
        lag=lag,
        wait=True,
        on_warning=pytest.fail,
        resumed=resumed,
    )


def counts(step: int, layer: int) -> Int64:
    draw = np.random.default_rng((step, layer))
    return (draw.pareto(1.0, (GEOMETRY.num_ranks, GEOMETRY.num_experts)) * 100).astype(np.int64)


def run(source: PlannedLayouts, steps: range, layouts: list[ExpertLayout]) -> list[object]:
    in_force: list[object] = []
    for step in steps:
        due = source.due(step)
        if due is not None:
            layouts[:] = due
        in_force.append(list(layouts))
        for layer in range(len(LAYERS)):
            source.observe(step, layer, counts(step, layer))
    return in_force


@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("name", ["greedy", "laer"])
def test_layouts_after_a_resume_are_those_without_an_interruption(name: str, lag: int) -> None:
    static = [ExpertLayout.static(*SHAPE)] * len(LAYERS)
    whole = planner(name, lag)
    expected = run(whole, range(STEPS), list(static))
    whole.close()
    assert len({repr(found) for found in expected}) > STEPS // 2

    source, layouts, found = planner(name, lag), list(static), []
    for stop in (2, 5, STEPS):
        found += run(source, range(len(found), stop), layouts)
        saved = source.state()
        source.close()
        plans = tuple(saved.plans)
        assert [plan.source_step for plan in plans] == list(range(max(0, stop - lag), stop))
        forecasts = tuple(saved.forecasts[layer] for layer in range(len(LAYERS)))
        state = PlannerState(stop, 0, LAYERS, tuple(layouts), forecasts, plans)
        source = planner(name, lag, PlannerState.from_bytes(state.to_bytes()))
    source.close()
    assert found == expected


def test_state_does_not_wait_for_ever_and_leaves_out_what_is_not_planned() -> None:
    go_on = threading.Event()

    class Hung:
        name = "hung"

        def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
            go_on.wait()
            return current

    service = PlannerService(Hung(), [0], ExpertLayout.static(*SHAPE), pytest.fail, lossless=True)
    service.submit(0, 0, counts(0, 0))
    state = service.state(timeout_s=0.05)
    assert not state.caught_up
    assert state.plans == []
    go_on.set()
    state = service.state(timeout_s=300.0)
    assert state.caught_up
    assert [plan.source_step for plan in state.plans] == [0]
    assert service.wait(0, 300.0) is state.plans[0]  # reading it changed nothing
    assert service.close(300.0)
