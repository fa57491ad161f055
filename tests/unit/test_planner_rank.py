"""A group's first rank: whole steps go to the planner, microbatches and layouts to recordings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.choices import LatePlan
from megatron_laer.config import FSEPConfig
from megatron_laer.files import writing
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.forecast import WINDOW
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import PlannerService
from megatron_laer.precision import Precision
from megatron_laer.runtime.planning import planner_rank
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, LayoutRecorder, read_layouts
from megatron_laer.runtime.planning.planner_rank import PlannerRank, run_of_group
from megatron_laer.telemetry.trace_file import TRACE, TraceWriter
from megatron_laer.tools.traces.reading import read_recording
from tests.costs import make_costs
from tests.records import put_together, taken_apart

GEOMETRY = Geometry(num_ranks=2, num_experts=4, capacity=3, node_size=2)
LAYERS = ["layer 1", "layer 2"]
LAYOUT = ExpertLayout.static(2, 3, 4)


def first_rank(
    config: FSEPConfig | None = None, costs: CostModel | None = None, **more: Any
) -> PlannerRank:
    return PlannerRank(
        config or FSEPConfig(),
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


def counts(value: int) -> Int64:
    return np.full((2, 4), value, dtype=np.int64)


@pytest.fixture
def submitted() -> Iterator[list[tuple[int, int, Any]]]:
    """What the planner's thread would get: step, layer, and the counts of one rank and expert."""
    found: list[tuple[int, int, Any]] = []

    def submit(self: PlannerService, step: int, layer: int, counts_NE: Int64) -> None:
        if counts_NE[..., 0, 0].max() == 13:
            raise RuntimeError("no thirteen")
        found.append((step, layer, counts_NE[..., 0, 0].tolist()))

    with mock.patch.object(PlannerService, "submit", submit):
        yield found


def test_a_layers_sum_is_planned_from_once_with_its_last_microbatch(submitted: list[Any]) -> None:
    with contextlib.closing(first_rank()) as first:
        first.begin_step(4, num_microbatches=2)
        first.put(0, 0, counts(1))
        first.put(1, 0, counts(5))
        assert submitted == []
        first.put(0, 1, counts(2))
        assert submitted == [(4, 0, 3)]
        first.end_step()
        assert len(submitted) == 1, "the second layer's step is not complete"
        first.begin_step(5, num_microbatches=1)
        first.put(1, 0, counts(7))
        assert submitted[1:] == [(5, 1, 7)], "nothing of the step before is in it"


def test_without_a_number_of_microbatches_sums_are_planned_from_when_the_step_ends(
    submitted: list[Any],
) -> None:
    with contextlib.closing(first_rank()) as first:
        first.begin_step(0, num_microbatches=None)
        for number in range(3):
            first.put(1, number, counts(1))
        assert submitted == []
        first.end_step()
        assert submitted == [(0, 1, 3)]


def test_the_papers_planner_gets_the_last_microbatches(submitted: list[Any]) -> None:
    with contextlib.closing(first_rank(FSEPConfig(planner="laer"))) as first:
        for step in range(2):
            first.begin_step(step, num_microbatches=WINDOW + 2)
            for number in range(WINDOW + 2):
                first.put(0, number, counts(number))
    assert submitted == [(step, 0, [*range(2, WINDOW + 2)]) for step in range(2)]


def test_counts_that_change_afterwards_change_no_sum(submitted: list[Any]) -> None:
    with contextlib.closing(first_rank()) as first:
        first.begin_step(0, num_microbatches=2)
        mine = counts(1)
        first.put(0, 0, mine)
        mine += 100
        first.put(0, 1, counts(1))
        for number in range(2):  # the step is repeated
            first.put(0, number, counts(1))
    assert submitted == [(0, 0, 2)] * 2


def test_a_planner_that_raises_is_counted_and_named_and_the_next_layer_goes_on(
    submitted: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(first_rank()) as first:
        first.begin_step(7, num_microbatches=1)
        first.put(0, 0, counts(13))
        first.put(1, 0, counts(1))
        assert first.status.failures == 1 and submitted == [(7, 1, 1)]
    (warning,) = caplog.messages
    assert "step 7, layer 1" in warning and "no thirteen" in warning


def test_recordings_that_fail_end_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = {name: str(tmp_path) for name in ("record_layouts", "record_trace")}
    layouts = [[GEOMETRY.random_layout((step, layer)) for layer in range(2)] for step in range(3)]
    with contextlib.closing(first_rank(FSEPConfig(**folders))) as first:
        for step in range(3):
            first.due(step)
            first.begin_step(step, num_microbatches=2)
            first.applied(step, layouts[step] if step < 2 else layouts[step][:1])
            for layer, number in np.ndindex(2, 2):
                shape = (9, 9) if (step, layer) == (1, 0) else (2, 4)
                first.put(layer, number, np.ones(shape, dtype=np.int64))
    assert "recording of routing ends at step 1" in caplog.text
    assert "recording of layouts ends at step 2" in caplog.text
    assert len(read_recording(TRACE.path(tmp_path, 0))) == 4
    assert list(read_layouts(LAYOUTS.path(tmp_path, 0))) == list(enumerate(layouts[:2]))


def test_unquantised_layers_are_planned_at_the_prices_of_bf16() -> None:
    recipe = Precision.MXFP8
    layouts = {
        recipe: GEOMETRY.random_layout((1,)),
        Precision.PARAMETERS: GEOMETRY.random_layout((2,)),
    }

    def made(name: str, *, geometry: Geometry, costs: CostModel) -> Any:
        return SimpleNamespace(name=name, plan=lambda counts_NE, current: layouts[costs.precision])

    config = FSEPConfig(plan_lag=1, late_plan=LatePlan.WAIT)
    with mock.patch.object(planner_rank, "make_strategy", made):
        first = first_rank(config, costs=make_costs(precision=recipe), unquantised={1})
    with contextlib.closing(first):
        first.begin_step(0, num_microbatches=1)
        for layer in range(len(LAYERS)):
            first.put(layer, 0, counts(1))
        assert first.due(1) == (layouts[recipe], layouts[Precision.PARAMETERS])


def test_a_start_that_fails_names_the_flag_and_lets_go_of_what_it_opened(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "traces" / "group-0.trace", 2, 4, LAYERS)
    layouts, traces = str(tmp_path / "layouts"), str(tmp_path / "traces")
    config = FSEPConfig(record_layouts=layouts, record_trace=traces)
    with pytest.raises(ValueError, match=rf"--fsep-record '{traces}' trace: .*another run"):
        first_rank(config)
    writing.open_exclusively(LAYOUTS.path(layouts, 0)).close()
    writer.close()
    first_rank(config).close()


def test_recordings_of_a_run_have_one_number(tmp_path: Path) -> None:
    """A resumed run that records more than before goes on with the number of what is there."""
    folders = {name: str(tmp_path) for name in ("record_layouts", "record_trace")}
    config = FSEPConfig(**folders, record_metrics=str(tmp_path / "new"))
    number = run_of_group(config, 0, 1)
    TraceWriter(tmp_path / "group-0.trace", 2, 4, LAYERS, 0, number).close()
    assert run_of_group(config, 0, 1) == number
    assert number not in (run_of_group(config, 1, 1), run_of_group(config, 0, 0))


CONFIG = FSEPConfig()
REGIME = {
    "split": CONFIG.split,
    "plan_mode": CONFIG.mode,
    "imbalance_tolerance": CONFIG.imbalance_tolerance,
}


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
