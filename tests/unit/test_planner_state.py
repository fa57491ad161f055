"""A planner's state comes back from its bytes, and nothing else is accepted as one."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from typing import Any

import numpy as np
import pytest

from megatron_laer.choices import Sharding
from megatron_laer.planner import state as states
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.state import PlannerState
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
        assert (forecast.level_NE is None) == (saved.level_NE is None)
        assert forecast.level_NE is None or (forecast.level_NE == saved.level_NE).all()
        assert forecast.weight == saved.weight
        assert forecast.errors == saved.errors
        assert (forecast.steady_NE is None) == (saved.steady_NE is None)
        assert forecast.steady_NE is None or (forecast.steady_NE == saved.steady_NE).all()
    assert found.forecasts[0].errors != (0, 0)


def test_a_state_of_forecasts_with_one_mean_is_read() -> None:
    state = make_state()
    header, payload = taken_apart(state.to_bytes())
    del header["errors"]
    levels = payload[: len(payload) - 2 * N * E * 8]  # of two layers; the third was not observed
    found = PlannerState.from_bytes(signed(header, levels))
    counts_NE = np.random.default_rng(1).integers(0, 1000, (N, E))
    for forecast, saved in zip(found.forecasts, state.forecasts, strict=True):
        assert forecast.steady_NE is None
        if saved.level_NE is not None:
            assert (forecast.counts_NE() == saved.level_NE).all()
            level_NE = forecast.observe(counts_NE).level_NE
            expected_NE = saved.observe(counts_NE).level_NE
            assert level_NE is not None and expected_NE is not None
            assert (level_NE == expected_NE).all()


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
        ({"version": 1.0}, "version"),
        ({"num_ranks": 2**70}, "arrays"),
        ({"num_ranks": N * 2, "num_experts": E // 2}, "slots|arrays|expert"),
        ({"capacity": 0}, "at least 1"),
        ({"capacity": 7}, "a rank none twice"),
        ({"layers": ["a", "a", "b"]}, "different names"),
        ({"layers": ["a", "b", 3]}, "names"),
        ({"layers": ["a", "b", "c" * 1000]}, "characters"),
        ({"layers": []}, "names"),
        ({"observed": [True, 0, True]}, "observed"),
        ({"observed": [True, True, True]}, "arrays"),
        ({"plans": [{"source_step": 7, "plan_ms": 1.0}]}, "arrays"),
        ({"plans": [{"source_step": 7, "plan_ms": 1.0}] * 2}, "comes after"),
        ({"plans": [{"source_step": s, "plan_ms": 1.0} for s in (7, 8)]}, "source_step"),
        ({"plans": [{"source_step": s, "plan_ms": float("nan")} for s in (6, 7)]}, "plan_ms"),
        ({"plans": [{"source_step": 6}, {"source_step": 7}]}, "plan must have"),
        ({"plans": [6, 7]}, "plan must have"),
        ({"more": 1}, "header must have"),
        ({"observed": NESTED}, "observed"),
        ({"errors": [[1, 2], None]}, "errors"),
        ({"errors": [[1, 2], None, [1, True]]}, "errors"),
        ({"errors": [[1, 2], [1, 2], None]}, "no level"),
        ({"errors": [[1, 2], None, [1, -2]]}, "errors"),
        ({"errors": [[1, 2], None, None]}, "arrays"),
        ({"errors": NESTED}, "errors"),
        ({"layers": NESTED}, "names"),
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


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"", b"\xff", b"null", b"[]", b'{"a":1}', b"1" * 10_000]
)
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    with pytest.raises(ValueError):
        PlannerState.from_bytes(signed(header, b""))


def test_loads_that_no_step_can_have_are_refused() -> None:
    header, payload = taken_apart(make_state().to_bytes())
    for level in (-1, 2**62):
        wrong = payload[:-8] + struct.pack("<q", level)
        with pytest.raises(ValueError, match="loads"):
            PlannerState.from_bytes(signed(header, wrong))
    twice = payload[: -2 * 8] + struct.pack("<qq", 2**63 - 1, 2**63 - 1)  # wraps in int64
    with pytest.raises(ValueError, match="loads"):
        PlannerState.from_bytes(signed(header, twice))


def test_every_changed_byte_and_every_cut_is_found() -> None:
    data = make_state().to_bytes()
    for at in range(len(data)):
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]):
            with pytest.raises(ValueError):
                PlannerState.from_bytes(wrong)
    with pytest.raises(ValueError, match="digest"):
        PlannerState.from_bytes(data + b"\0")


CASES = 6000


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
