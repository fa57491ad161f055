"""A planner's state comes back from its bytes, and nothing else is accepted as one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import numpy as np
import pytest

from megatron_laer.choices import Sharding
from megatron_laer.planner import state as states
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.state import PlannerState
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.planner_checkpoint import (
    Resumption,
    report_resumption,
    save_state,
    state_path,
)
from tests.fuzz import damaged
from tests.planner_states import LAYERS, C, E, N, make_state

PREFIX = struct.Struct("<8sII")
# The reader of JSON can handle this depth.
NESTED: list[Any] = []
for _ in range(900):
    NESTED = [NESTED]


def signed(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = PREFIX.pack(b"FSEPPLAN", 1, len(text)) + text + payload
    return body + states._digest(body)


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = PREFIX.unpack_from(data)[2]
    end = PREFIX.size + length
    return json.loads(data[PREFIX.size : end]), data[end:-32]


def test_a_state_comes_back_as_it_was() -> None:
    state = make_state()
    found = PlannerState.from_bytes(state.to_bytes())
    for name in ("next_step", "version", "layers", "layouts", "plans"):
        assert getattr(found, name) == getattr(state, name), name
    for forecast, saved in zip(found.forecasts, state.forecasts, strict=True):
        assert type(forecast) is type(saved)
        np.testing.assert_array_equal(forecast.kept, saved.kept)
        if isinstance(saved, SmoothedForecast):
            assert isinstance(forecast, SmoothedForecast) and forecast.errors == saved.errors
    assert [len(forecast.kept) for forecast in found.forecasts] == [2, 0, 3]


def test_a_state_of_another_group_is_refused_with_what_differs() -> None:
    state = make_state()
    state.check_fits(Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2), LAYERS)
    for other in ({"num_ranks": 8}, {"capacity": 4}, {"num_experts": 5}):
        sizes = {"num_ranks": N, "capacity": C, "num_experts": E} | other
        with pytest.raises(ValueError, match=r"C = 3 slots and E = 6 experts, this one has N ="):
            state.check_fits(Geometry(node_size=1, **sizes), LAYERS)
    geometry = Geometry(num_ranks=N, num_experts=E, capacity=C, node_size=2)
    with pytest.raises(ValueError, match=r"3 layers, layer 2 to mtp 1, this group has layer 2"):
        state.check_fits(geometry, LAYERS[:1])


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"next_step": -1}, "next_step"),
        ({"version": True}, "version"),
        ({"num_ranks": 2**70}, "arrays"),
        ({"num_ranks": N * 2, "num_experts": E // 2}, "slots|arrays|expert"),
        ({"capacity": 0}, "at least 1"),
        ({"capacity": 7}, "a rank none twice"),
        ({"layers": ["a", "a", "b"]}, "different names"),
        ({"layers": ["a", "b", "c" * 1000]}, "characters"),
        ({"layers": []}, "names"),
        ({"kept": [2, False, 3]}, "kept"),
        ({"kept": [2, 0, 6]}, "kept"),
        ({"kept": [2, 0, 5]}, "arrays"),
        ({"kept": [1, 0, 4]}, "must keep two means or none, got 1"),
        ({"plans": [{"source_step": 7, "plan_ms": 1.0}] * 2}, "comes after"),
        ({"plans": [{"source_step": s, "plan_ms": 1.0} for s in (7, 8)]}, "source_step"),
        ({"plans": [{"source_step": s, "plan_ms": float("nan")} for s in (6, 7)]}, "plan_ms"),
        ({"plans": [{"source_step": 6}, {"source_step": 7}]}, "plan must have"),
        ({"more": 1}, "header must have"),
        ({"kept": NESTED}, "kept"),
        ({"errors": [[1, 2], None]}, "errors"),
        ({"errors": [[1, -2], [0, 0], None]}, "errors"),
        ({"plans": NESTED}, "plan must have"),
    ],
)
def test_a_wrong_number_with_a_right_digest_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    header, payload = taken_apart(make_state().to_bytes())
    assert PlannerState.from_bytes(signed(header, payload)).version == 5
    with pytest.raises(ValueError, match=message):
        PlannerState.from_bytes(signed(header | changes, payload))


def test_loads_that_no_step_can_have_are_refused() -> None:
    header, payload = taken_apart(make_state().to_bytes())
    for level in (-1, 2**62):
        wrong = payload[:-8] + struct.pack("<q", level)
        with pytest.raises(ValueError, match="loads"):
            PlannerState.from_bytes(signed(header, wrong))
    twice = payload[: -2 * 8] + struct.pack("<qq", 2**63 - 1, 2**63 - 1)  # wraps in int64
    with pytest.raises(ValueError, match="loads"):
        PlannerState.from_bytes(signed(header, twice))


CASES = 3000


@pytest.mark.counts(fuzz_cases=CASES)
def test_only_value_errors_come_out_of_damaged_bytes() -> None:
    state = make_state().to_bytes()
    end = len(state) - 32
    text_end = PREFIX.size + PREFIX.unpack_from(state)[2]
    draw = random.Random(1)
    accepted = 0
    for case in range(CASES):
        if case % 3 == 0:
            data = damaged(state, draw)
        elif case % 3 == 1:  # a correct digest, so that the checks behind it run
            body = damaged(state[:end], draw)
            data = body + states._digest(body)
        else:  # with a correct prefix as well
            data = signed(damaged(state[PREFIX.size : text_end], draw), state[text_end:end])
        try:
            found = PlannerState.from_bytes(data)
        except ValueError:
            continue
        accepted += 1
        assert PlannerState.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes()
    assert 0 < accepted < CASES // 4


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


def said(caplog: pytest.LogCaptureFixture, first_step: int, *groups: int | str | None) -> list[str]:
    """Return the log of a world with one rank per group, given a state's version or problem.

    The ranks load in turn. Rank 0 is the last, so it receives all answers.
    """
    shares: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        shares.append(mine)
        everyone[:] = shares + [(None, None)] * (len(groups) - len(shares))

    world = SimpleNamespace(
        get_world_size=lambda: len(groups),
        get_rank=lambda: len(groups) - len(shares),
        all_gather_object=gather,
    )
    with mock.patch.object(planner_checkpoint, "dist", world), caplog.at_level(logging.INFO):
        for found in groups:
            state: Any = SimpleNamespace(version=found) if isinstance(found, int) else None
            problem = found if isinstance(found, str) else None
            report_resumption(Resumption(state, problem), first_step)
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_run_that_was_resumed_says_once_for_all_groups_what_it_goes_on_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert said(caplog, 0, None, None) == []
    (line,) = said(caplog, 30, 7)
    assert line.endswith("is restored: training goes on with step 30, layout version 7")
    (line,) = said(caplog, 30, 7, 5, 7)
    assert line.endswith("layout version 5 to 7, 3 groups")
    (line,) = said(caplog, 30, 7, "group-1.bin is cut off")
    assert line.endswith("static layout in 1 of 2 groups: group-1.bin is cut off")
    # Loaded without calling the plugin, like Megatron's local checkpoints.
    (line,) = said(caplog, 30, None)
    assert "planning starts anew, from the static layout: what the run is resumed from" in line
