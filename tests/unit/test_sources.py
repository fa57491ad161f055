"""Sources of layouts: repeated steps, recordings that go on, replays that start late."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.runtime.planning import layout_sources
from megatron_laer.runtime.planning.layout_recording import LayoutRecorder
from megatron_laer.runtime.planning.layout_sources import PlannedLayouts, ReplayedLayouts
from tests.costs import make_costs
from tests.fuzz import damaged, resealed

GEOMETRY = Geometry(num_ranks=2, num_experts=4, capacity=3, node_size=2)
LAYERS = ["layer 1", "layer 2"]
REGIME = {"split": "exact", "plan_mode": "forecast"}
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
        mock.patch.object(layout_sources, "WAIT_TIMEOUT_S", 0.2),
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
        _, plans = source.state()  # a checkpoint does not wait either
        assert not plans and source.late_plans == (60 if first == "a step" else 59)

        released.set()
        stack.enter_context(mock.patch.object(layout_sources, "PLANS_TIMEOUT_S", 300.0))
        # Of the 60 steps the first and the newest are planned, as under `keep`.
        _, plans = source.state()
        assert plans[-1].source_step == 59 and len(plans) <= 3
        assert source.due(60) == layouts(0)
    source.close()


def test_a_recording_goes_on_where_a_resumed_run_starts(tmp_path: Path) -> None:
    path = tmp_path / "group-0.jsonl"
    first = LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=0)
    for step in (1, 2, 3):
        first.record(step, layouts(step))
    first.close()
    resumed = LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=3)
    resumed.record(3, layouts(33))
    resumed.close()

    replay = ReplayedLayouts(path, GEOMETRY, REGIME, LAYERS)
    assert [replay.due(step) for step in (1, 2, 3, 4)] == [
        layouts(1),
        layouts(2),
        layouts(33),
        None,
    ]


def test_a_replay_that_starts_late_begins_with_the_layouts_in_force(tmp_path: Path) -> None:
    path = tmp_path / "group-0.jsonl"
    recorder = LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=0)
    recorder.record(2, layouts(2))
    recorder.record(9, layouts(9))
    recorder.close()
    replay = ReplayedLayouts(path, GEOMETRY, REGIME, LAYERS)
    assert replay.due(6) == layouts(2)
    assert replay.due(7) is None
    assert replay.due(9) == layouts(9)


def test_a_recording_made_with_another_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "group-0.jsonl"
    LayoutRecorder(path, GEOMETRY, REGIME | {"split": "even"}, LAYERS, first_step=0).close()
    with pytest.raises(ValueError, match="even"):
        ReplayedLayouts(path, GEOMETRY, REGIME, LAYERS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": -5}, "-5"),
        ({"step": 1.9}, "1.9"),
        ({"step": True}, "True"),
        ({"step": "7"}, "'7'"),
        ({"step": 2}, "above 2"),
        ({"more": 1}, "more"),
        ({"slots": []}, "0 layers"),
    ],
)
def test_an_entry_that_no_recorder_writes_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "group-0.jsonl"
    recorder = LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=0)
    recorder.record(2, layouts(2))
    recorder.record(3, layouts(3))
    recorder.close()
    *before, last = path.read_text().splitlines()
    changed = json.loads(last) | change
    del changed["crc"]
    path.write_text("\n".join([*before, resealed(json.dumps(changed))]))
    with pytest.raises(ValueError, match=f"line 3: .*{named}"):
        ReplayedLayouts(path, GEOMETRY, REGIME, LAYERS)


CASES = 2000


@pytest.mark.counts(fuzz_cases=CASES)
def test_a_damaged_recording_gives_legal_layouts_or_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "group-0.jsonl"
    recorder = LayoutRecorder(path, GEOMETRY, REGIME, LAYERS, first_step=0)
    for step in range(4):
        recorder.record(step, layouts(step))
    recorder.close()
    content = path.read_bytes()
    luck = random.Random(3)
    accepted = 0
    for _ in range(CASES):
        path.write_bytes(damaged(content, luck))
        try:
            replay = ReplayedLayouts(path, GEOMETRY, REGIME, LAYERS)
        except ValueError as error:
            assert "layout recording: " in str(error)
            continue
        accepted += 1
        due = [replay.due(step) for step in range(6)]
        assert all(len(layers) == len(LAYERS) for layers in due if layers is not None)
        for layout in (layout for layers in due if layers is not None for layout in layers):
            assert ExpertLayout.from_slots(2, 3, 4, layout.to_list()) == layout
    assert 0 < accepted < CASES // 2
