"""A planner resumed from its saved state makes the same plans."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.planner.by_pairs import WHOLE, Choice, PairPlanner
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


def planner(
    name: str, lag: int, resumed: PlannerState | None = None, interval: int | None = None
) -> PlannedLayouts:
    return PlannedLayouts(
        Slow(make_strategy(name, geometry=GEOMETRY, costs=make_costs())),
        resumed.layouts if resumed else [ExpertLayout.static(*SHAPE)] * len(LAYERS),
        lag=lag,
        wait=True,
        on_warning=pytest.fail,
        resumed=resumed,
        by_pairs=None if interval is None else Alternating(GEOMETRY, make_costs(), interval),
    )


class Alternating(PairPlanner):
    """Planner by pairs whose layouts depend on all that it is given, and are often taken."""

    def place(self, pairs_EE: Int64, counts_NE: Int64, by_counts: ExpertLayout) -> ExpertLayout:
        time.sleep(0.01)
        return self.geometry.random_layout((int(pairs_EE[0, 0]), int(counts_NE[0, 0] % 1000)))

    def choose(
        self,
        counts_NE: Int64,
        by_counts: ExpertLayout,
        by_pairs: ExpertLayout | None,
        pairs_EE: Int64,
    ) -> Choice:
        if by_pairs is None or int(counts_NE[0, 0] + pairs_EE[0, 0]) % 3 == 0:
            return Choice(by_counts)
        return Choice(by_pairs, int(pairs_EE[0, 0]))


def counts(step: int, layer: int) -> Int64:
    draw = np.random.default_rng((step, layer))
    return (draw.pareto(1.0, (GEOMETRY.num_ranks, GEOMETRY.num_experts)) * 100).astype(np.int64)


def pairs(step: int) -> Int64:
    experts = GEOMETRY.num_experts
    return np.full((len(LAYERS), experts, experts), 1 + step, dtype=np.int64)


def run(
    source: PlannedLayouts,
    steps: range,
    layouts: list[ExpertLayout],
    interval: int | None = None,
    shares: list[int] | None = None,
) -> list[object]:
    """Return the layouts, and shares of rows, of each step; pairs come with the step's end."""
    in_force: list[object] = []
    for step in steps:
        due = source.due(step)
        if due is not None:
            layouts[:] = due
            if shares is not None:
                shares[:] = source.row_shares
        in_force.append((list(layouts), list(shares or ())))
        for layer in range(len(LAYERS)):
            source.observe(step, layer, counts(step, layer))
        if interval is not None and step % interval == 0:
            source.observe_pairs(step, pairs(step))
    return in_force


@pytest.mark.parametrize("interval", [None, 1, 2, 5])
@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("name", ["greedy", "laer"])
def test_layouts_after_a_resume_are_those_without_an_interruption(
    name: str, lag: int, interval: int | None
) -> None:
    static = [ExpertLayout.static(*SHAPE)] * len(LAYERS)
    whole, shares = planner(name, lag, interval=interval), [WHOLE] * len(LAYERS)
    expected = run(whole, range(STEPS), list(static), interval, shares)
    whole.close()
    assert len({repr(found) for found in expected}) > STEPS // 2
    assert (shares != [WHOLE] * len(LAYERS)) == (interval is not None)

    source, layouts, found = planner(name, lag, interval=interval), list(static), []
    shares = [WHOLE] * len(LAYERS)
    for stop in (2, 5, STEPS):
        found += run(source, range(len(found), stop), layouts, interval, shares)
        saved = source.state()
        source.close()
        plans = tuple(saved.plans)
        assert [plan.source_step for plan in plans] == list(range(max(0, stop - lag), stop))
        forecasts = tuple(saved.forecasts[layer] for layer in range(len(LAYERS)))
        state = PlannerState(
            stop, 0, LAYERS, tuple(layouts), forecasts, plans, tuple(shares), saved.pairs
        )
        resumed = PlannerState.from_bytes(state.to_bytes())
        source = planner(name, lag, resumed, interval)
        shares = list(resumed.row_shares)
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


def test_layers_wait_for_their_layouts_by_pairs_where_a_step_would_be_late() -> None:
    order, placing, go_on = [], threading.Event(), threading.Event()

    class Placing(Alternating):
        def place(self, pairs_EE: Int64, counts_NE: Int64, by_counts: ExpertLayout) -> ExpertLayout:
            order.append("place")
            placing.set()
            assert go_on.wait(300.0)
            return super().place(pairs_EE, counts_NE, by_counts)

    class Kept:
        name = "kept"

        def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
            order.append("plan")
            return current

    by_pairs = Placing(GEOMETRY, make_costs(), 1)
    layers = range(len(LAYERS))
    service = PlannerService(
        Kept(), layers, ExpertLayout.static(*SHAPE), pytest.fail, by_pairs=by_pairs
    )
    service.submit_pairs(0, pairs(0))
    for step in (1, 2):
        for layer in layers:
            service.submit(step, layer, counts(step, layer))
        assert placing.wait(300.0)
    go_on.set()
    assert service.state(timeout_s=300.0).caught_up
    assert order == ["plan"] * 3 + ["place"] + ["plan"] * 3 + ["place"] * 2
    assert service.close(300.0)
