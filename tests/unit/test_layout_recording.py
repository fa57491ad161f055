"""Recordings of layouts: refusals when they are read or opened by the group's first rank."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.choices import Fp8Recipe, Sharding
from megatron_laer.config import FSEPConfig, LatePlan
from megatron_laer.files import writing
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.runtime.planning import planned_layouts, planner_rank
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, LayoutRecorder, read_layouts
from megatron_laer.runtime.planning.planned_layouts import PlannedLayouts
from megatron_laer.runtime.planning.planner_rank import PlannerRank, run_of_group
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.costs import make_costs
from tests.records import put_together, taken_apart

GEOMETRY = Geometry(num_ranks=2, num_experts=4, capacity=3, node_size=2)
AT_HOME = dataclasses.replace(GEOMETRY, sharding=Sharding.EXPERTS)
LAYERS = ["layer 1", "layer 2"]
CONFIG = FSEPConfig()
REGIME = {
    "split": CONFIG.split,
    "plan_mode": CONFIG.mode,
    "imbalance_tolerance": CONFIG.imbalance_tolerance,
}
LAYOUT = ExpertLayout.static(2, 3, 4)


def first_rank(config: FSEPConfig, costs: CostModel | None = None, **more: Any) -> PlannerRank:
    return PlannerRank(
        config,
        GEOMETRY,
        costs or make_costs(),
        LAYERS,
        [LAYOUT] * len(LAYERS),
        [HomeOrder.stock(GEOMETRY.num_experts)] * len(LAYERS),
        group_index=0,
        first_step=0,
        resumed=None,
        **more,
    )


def test_unquantised_layers_are_planned_at_the_prices_of_bf16() -> None:
    recipe = Fp8Recipe.MXFP8
    layouts = {recipe: GEOMETRY.random_layout((1,)), None: GEOMETRY.random_layout((2,))}

    def made(name: str, *, geometry: Geometry, costs: CostModel) -> Any:
        return SimpleNamespace(name=name, plan=lambda counts_NE, current: layouts[costs.fp8])

    config = FSEPConfig(plan_lag=1, late_plan=LatePlan.WAIT)
    with mock.patch.object(planner_rank, "make_strategy", made):
        first = first_rank(config, costs=make_costs(fp8=recipe), unquantised={1})
    with contextlib.closing(first):
        assert first._source is not None
        for layer in range(len(LAYERS)):
            first._source.observe(0, layer, np.ones((2, 4), dtype=np.int64))
        assert first.due(1) == [layouts[recipe], layouts[None]]


def test_layouts_of_home_experts_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "group-0.layouts"
    recorder = LayoutRecorder(path, AT_HOME, REGIME, LAYERS, first_step=0)
    layouts = [[AT_HOME.static_layout, AT_HOME.random_layout((step,))] for step in range(6)]
    for step, of_step in enumerate(layouts):
        recorder.record(step, of_step)
    recorder.close()
    assert list(read_layouts(path)) == list(enumerate(layouts))


@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({}, [0, 1, 2, 2, 3, -1], "empty slots, which only --fsep-sharding experts"),
        ({}, [0, 1, 2, 2, 3, -2], "slots hold expert -2"),
        ({"homes": [[0, 1, 2, 3], [0, 1, 2, 2]]}, [0] * 6, "line 1: .*permutation|homes|each"),
        ({"homes": [[0, 1, 2, 3]]}, [0] * 6, "must be those of every layer's experts"),
        ({"homes": 5}, [0] * 6, "line 1: "),
        ({"sharding": "experts"}, [0, 1, 2, 2, -1, 3], "does not fit --fsep-sharding experts"),
        ({"sharding": "experts"}, [0, 1, 1, 2, 3, -1], "does not fit --fsep-sharding experts"),
        ({"sharding": "experts", "num_experts": 3}, [0] * 6, "3 experts cannot be at home on 2"),
        ({"sharding": "columns"}, [0, 1, 2, 2, 3, 0], "'columns' must be one of rows, experts"),
        ({"sharding": [[]]}, [0, 1, 2, 2, 3, 0], "must be one of rows, experts"),
    ],
)
def test_slots_that_do_not_fit_the_recorded_sharding_are_refused(
    tmp_path: Path, changes: dict[str, object], slots: list[int], message: str
) -> None:
    path = LAYOUTS.path(tmp_path, 0)
    LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=0).close()
    fields, _ = taken_apart(path)
    slots_LNC = np.array([slots] * len(LAYERS)).reshape(len(LAYERS), 2, 3)
    put_together(path, fields | changes, [("layouts", 0, {"slots_LNC": slots_LNC})])
    with pytest.raises(ValueError, match=message) as error:
        list(read_layouts(path))
    assert str(path) in str(error.value)


def test_a_start_that_fails_names_the_flag_and_lets_go_of_what_it_opened(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "traces" / "group-0.trace", 2, 4, LAYERS)
    layouts, traces = str(tmp_path / "layouts"), str(tmp_path / "traces")
    config = FSEPConfig(record_layouts=layouts, record_trace=traces)
    with pytest.raises(ValueError, match=rf"--fsep-record '{traces}' trace: .*another run"):
        first_rank(config)
    writing.open_exclusively(tmp_path / "layouts" / "group-0.layouts").close()
    writer.close()
    first_rank(config).close()


def test_recordings_of_a_run_have_one_number(tmp_path: Path) -> None:
    """A resumed run that records more than before goes on with the number of what is there."""
    folders = {name: str(tmp_path) for name in ("record_layouts", "record_trace")}
    numbers = [run_of_group(FSEPConfig(**folders), group) for group in (0, 0)]
    assert numbers[0] != numbers[1]
    TraceWriter(tmp_path / "group-0.trace", 2, 4, LAYERS, 0, numbers[0]).close()
    config = FSEPConfig(**folders, record_metrics=str(tmp_path / "new"))
    assert run_of_group(config, 0) == numbers[0] != run_of_group(config, 1)


COSTS = make_costs()


def layouts(seed: int) -> list[ExpertLayout]:
    return [ExpertLayout.random(2, 3, 4, (seed, layer)) for layer in range(len(LAYERS))]


def test_a_step_that_is_observed_twice_is_planned_from_under_wait() -> None:
    # Megatron's rerun state machine repeats forward and backward of a step.
    source = PlannedLayouts(
        make_strategy("greedy", geometry=GEOMETRY, costs=COSTS),
        layouts(0),
        lag=1,
        wait=True,
        on_warning=pytest.fail,
    )
    counts_NE = np.array([[9, 1, 0, 2], [8, 0, 3, 1]])
    for _ in range(2):
        for layer in range(len(LAYERS)):
            source.observe(5, layer, counts_NE)
    assert source.due(6) is not None
    assert source.late_plans == 0
    source.close()


def test_late_plans_are_reported_once_with_a_remedy() -> None:
    asked, released = threading.Event(), threading.Event()

    class Hanging:
        name = "hanging"

        def plan(self, _counts_NE: Any, current: ExpertLayout) -> ExpertLayout:
            asked.set()
            released.wait()
            return current

    warnings: list[str] = []
    source = PlannedLayouts(Hanging(), layouts(0), lag=1, wait=False, on_warning=warnings.append)
    for step in range(5, 8):
        for layer in range(len(LAYERS)):
            source.observe(step, layer, np.ones((2, 4), dtype=np.int64))
        assert asked.wait(300.0) and source.due(step + 1) is None
    assert source.late_plans == 3 and len(warnings) == 1
    assert "from step 5 was not ready at step 6" in warnings[0]
    assert "--fsep-set plan_lag=2" in warnings[0]
    released.set()
    source.close()


@pytest.mark.parametrize("first", ["a step", "a checkpoint"])
def test_a_planner_that_hangs_is_waited_for_once_and_its_return_is_noticed(first: str) -> None:
    released = threading.Event()

    class Hanging:
        name = "hanging"

        def plan(self, _counts_NE: Any, current: ExpertLayout) -> ExpertLayout:
            released.wait()
            return current

    warnings: list[str] = []
    with (
        contextlib.ExitStack() as stack,
        mock.patch.object(planned_layouts, "WAIT_TIMEOUT_S", 0.2),
        mock.patch.object(
            PlannerService, "wait", autospec=True, side_effect=PlannerService.wait
        ) as wait,
    ):
        source = PlannedLayouts(Hanging(), layouts(0), lag=1, wait=True, on_warning=warnings.append)
        for step in range(60):
            if step == 1 and first == "a checkpoint":
                source.state()
            for layer in range(len(LAYERS)):
                source.observe(step, layer, np.ones((2, 4), dtype=np.int64))
            if step > 0 or first == "a step":
                assert source.due(step + 1) is None
        assert wait.call_count == (first == "a step")
        assert any("not waited for" in warning for warning in warnings)
        plans = source.state().plans  # a checkpoint does not wait either
        assert not plans and source.late_plans == (60 if first == "a step" else 59)

        released.set()
        stack.enter_context(mock.patch.object(planned_layouts, "PLANS_TIMEOUT_S", 300.0))
        # The first and the newest of the 60 steps are planned, as under `keep`.
        plans = source.state().plans
        assert plans[-1].source_step == 59 and len(plans) <= 3
        assert source.due(60) == layouts(0)
    source.close()
