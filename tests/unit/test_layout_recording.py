"""Recordings of layouts: layouts that do not fit their header are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.choices import Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.geometry import Geometry
from megatron_laer.runtime.planning.layout_recording import LAYOUTS, LayoutRecorder, read_layouts
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
