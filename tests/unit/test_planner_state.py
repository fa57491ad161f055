"""A planner's state comes back from its bytes, and nothing else is accepted as one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer.choices import Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.files.records import Records, header_line
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.state import STATE, PlannerState
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce
from megatron_laer.runtime.planning.planner_checkpoint import (
    Resumption,
    report_resumption,
    save_state,
    state_path,
)
from tests.costs import COSTS
from tests.fuzz import damaged
from tests.planner_states import LAYERS, C, E, N, make_state
from tests.records import Content, put_together, taken_apart


def test_a_state_comes_back_as_it_was() -> None:
    state = make_state(run="0123456789abcdef")
    found = PlannerState.from_bytes(state.to_bytes())
    for name in ("next_step", "version", "layers", "layouts", "plans", "run"):
        assert getattr(found, name) == getattr(state, name), name
    for forecast, saved in zip(found.forecasts, state.forecasts, strict=True):
        assert type(forecast) is type(saved)
        np.testing.assert_array_equal(forecast.kept, saved.kept)
        if isinstance(saved, SmoothedForecast):
            assert isinstance(forecast, SmoothedForecast) and forecast.errors == saved.errors
    assert [len(forecast.kept) for forecast in found.forecasts] == [2, 0, 3]


def test_errors_of_both_means_come_back_in_their_order() -> None:
    geometry = Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2)
    forecast = SmoothedForecast((np.ones((N, E), dtype=np.int64),) * 2, (3, 5))
    state = PlannerState(1, 1, ("layer 1",), (geometry.static_layout,), (forecast,), ())
    (found,) = PlannerState.from_bytes(state.to_bytes()).forecasts
    assert isinstance(found, SmoothedForecast) and found.errors == (3, 5)


def test_a_state_of_another_group_is_refused_with_what_differs() -> None:
    state = make_state()
    state.check_fits(Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2), LAYERS)
    for other in ({"num_ranks": 8}, {"capacity": 4}, {"num_experts": 5}):
        sizes = {"num_ranks": N, "capacity": C, "num_experts": E} | other
        with pytest.raises(ValueError, match=r"C = 3 slots and E = 6 experts, this one has N ="):
            state.check_fits(Geometry(node_size=1, **sizes), LAYERS)
    geometry = Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2)
    for few, named in ((LAYERS[:1], "layer 2"), (LAYERS[:2], " and ".join(LAYERS[:2]))):
        said = f"3 layers, layer 2 to mtp 1, this group has {named}"
        with pytest.raises(ValueError, match=said):
            state.check_fits(geometry, few)


def test_a_state_of_another_run_is_refused_where_both_are_known() -> None:
    geometry = Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2)
    one, other = "0" * 16, "f" * 16
    for saved, run in ((None, None), (None, one), (one, None), (one, one)):
        found = PlannerState.from_bytes(make_state(run=saved).to_bytes())
        found.check_fits(geometry, LAYERS, run)
    for saved, run in ((one, other), (other, one)):
        said = f"of run {saved}, the checkpoint's weights of run {run}"
        with pytest.raises(ValueError, match=said):
            make_state(run=saved).check_fits(geometry, LAYERS, run)


@pytest.mark.parametrize(("first_step", "goes_on"), [(8, True), (7, False), (9, False)])
def test_a_run_goes_on_with_the_states_layouts_and_version_at_its_step(
    first_step: int, goes_on: bool
) -> None:
    """The version tells ranks apart that have missed a change of layouts."""
    geometry = Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2)
    others: Any = SimpleNamespace(rank=1)
    state = make_state()
    in_force = LayoutsInForce(FSEPConfig(), others, geometry, COSTS, 1, torch.device("cpu"))
    for layer in LAYERS:
        in_force.add_layer(layer)
    in_force.resumption = Resumption(state)
    in_force.start(first_step)
    begins = 0, (geometry.static_layout,) * len(LAYERS)
    expected = (state.version, state.layouts) if goes_on else begins
    assert (in_force.version, in_force.layouts) == expected
    assert (in_force.resumption.problem is None) == goes_on


def test_a_state_with_empty_slots_comes_back_and_fits_its_sharding_only() -> None:
    geometry = Geometry(2, E, 4, node_size=2, sharding=Sharding.EXPERTS)
    forecast = SmoothedForecast()
    drawn = [geometry.random_layout((seed,)) for seed in range(10)]
    for at_home in drawn:
        state = PlannerState(1, 1, ("layer 1",), (at_home,), (forecast,), ())
        found = PlannerState.from_bytes(state.to_bytes())
        assert found.layouts == (at_home,)
        found.check_fits(geometry, ["layer 1"])
        if EMPTY in at_home.to_list():
            with pytest.raises(ValueError, match="empty slots, which only --fsep-sharding experts"):
                found.check_fits(dataclasses.replace(geometry, sharding=Sharding.ROWS), ["layer 1"])
    assert any(EMPTY in at_home.to_list() for at_home in drawn)
    moved = PlannerState(1, 1, ("layer 1",), (ExpertLayout.random(2, 4, E, (3,)),), (forecast,), ())
    with pytest.raises(ValueError, match="does not fit --fsep-sharding experts"):
        moved.check_fits(geometry, ["layer 1"])


def _set(at: int, name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content[at][2].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_step": -1}, "next_step must be in"),
        ({"next_step": 7}, "plans must be of different steps before the next one"),
        ({"next_step": None}, "next_step must be in"),
        ({"layout_version": True}, "version must be in"),
        ({"plans": 3}, "has 2 plans of 3"),
        ({"run": "0123"}, "run must be 16 hexadecimal digits, got '0123'"),
        ({"run": 5}, "run must be 16 hexadecimal digits, got '5'"),
        (lambda content: content.pop(), "3 layers with 2 layouts"),
        (lambda content: content.append(content[-1]), "3 layers with 4 layouts"),
        (lambda content: content.pop(0), "has 1 plans of 2"),
        (lambda content: content.insert(0, content[0]), "has 3 plans of 2"),
        (_set(0, "plan_ms", float("nan")), "plan_ms must be a time, got nan"),
        (_set(0, "slots_LNC", np.zeros((3, N, C))), "expert"),
        (_set(2, "slots_NC", np.full((N, C), E)), "expert"),
        (_set(2, "kept_KNE", np.zeros((1, N, E))), "kept must be two means, int64"),
        (_set(2, "errors", (1, -2)), "errors must be in"),
        (_set(4, "kept_KNE", np.zeros((6, N, E))), "keeps 6 counts, at most 5"),
        (_set(4, "kept_KNE", np.full((1, N, E), 2**52 - 1)), "these are too large"),
    ],
)
def test_fields_and_records_that_no_planner_makes_are_refused(
    tmp_path: Path, change: dict[str, Any] | Callable[[Content], None], message: str
) -> None:
    path = tmp_path / "group-0.bin"
    path.write_bytes(make_state().to_bytes())
    fields, content = taken_apart(path)
    if callable(change):
        change(content)
    else:
        fields |= change
    put_together(path, fields, content)
    with pytest.raises(ValueError, match=message):
        PlannerState.from_bytes(path.read_bytes())


def test_a_state_that_is_cut_off_or_goes_on_is_refused() -> None:
    data = make_state().to_bytes()
    for wrong in (b"", data[:20], data[:-1], data + b"x", data + bytes(100), data + bytes(2**27)):
        with pytest.raises(ValueError, match="the state"):
            PlannerState.from_bytes(wrong)


CASES = 1000


def test_only_value_errors_come_out_of_a_damaged_header(tmp_path: Path) -> None:
    path, draw, accepted = tmp_path / "group-0.bin", random.Random(1), 0
    path.write_bytes(make_state().to_bytes())
    fields, content = taken_apart(path)
    text = json.dumps(fields).encode()
    for _ in range(CASES):
        try:
            header = header_line(STATE.name, dict(json.loads(damaged(text, draw))))
        except (ValueError, TypeError, RecursionError):  # no object of JSON
            continue
        # Checksums fit the damaged header, so that the checks behind them run.
        codec = Records(STATE, fields, header)
        records = [codec.encode(of[0], at, *of[1:]) for at, of in enumerate(content, start=1)]
        try:
            found = PlannerState.from_bytes(header + b"".join(records))
        except ValueError:
            continue
        accepted += 1
        assert PlannerState.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes()
    assert 0 < accepted < CASES // 2


def save(directory: Path, storage: Any, group_rank: int = 0) -> None:
    groups: Any = SimpleNamespace(rank=group_rank, index=0)
    state: Any = SimpleNamespace(to_bytes=lambda: b"state")
    save_state(str(directory), groups, lambda: state, storage)


def test_a_state_that_cannot_be_written_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: str, mode: str) -> IO[Any]:
        Path(path).write_bytes(b"half a ")
        return open("/dev/full", mode)

    with caplog.at_level(logging.WARNING):
        save(tmp_path, SimpleNamespace(os=os, open=full))
    (record,) = caplog.records
    assert "not in the checkpoint" in record.getMessage()
    assert "No space left" in record.getMessage()
    assert not Path(state_path(str(tmp_path), 0)).exists(), "half a state is left behind"


def test_only_the_groups_first_rank_writes(tmp_path: Path) -> None:
    storage = SimpleNamespace(os=os, open=open)
    save(tmp_path, storage, group_rank=1)
    assert not list(tmp_path.iterdir())
    save(tmp_path, storage)
    assert Path(state_path(str(tmp_path), 0)).read_bytes() == b"state"


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "goes on with step 30, layout version 7"),
        ([(5, None), (7, None)], "goes on with step 30, layout version 5 to 7, 3 groups"),
        ([(None, "group-1.bin is cut off")], "in 1 of 2 groups: group-1.bin is cut off"),
    ],
)
def test_a_resumed_run_logs_one_line_for_all_groups(
    others: list[tuple[int | None, str | None]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def gather(everyone: list[Any], mine: tuple[int | None, str | None]) -> None:
        everyone[:] = [mine, *others]

    world = SimpleNamespace(
        get_world_size=lambda: 1 + len(others), get_rank=lambda: 0, all_gather_object=gather
    )
    state = dataclasses.replace(make_state(), version=7)
    with mock.patch.object(planner_checkpoint, "dist", world), caplog.at_level(logging.INFO):
        report_resumption(Resumption(state), 30)
    (record,) = caplog.records
    assert record.getMessage().endswith(said)
