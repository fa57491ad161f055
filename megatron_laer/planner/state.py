"""State of a planner between steps, and its bytes in a checkpoint.

The bytes are not trusted: the digest, then every size and range are checked. Nothing is unpickled.

    magic, format, length of the header | header, JSON | slots in force, slots of the plans, int16
    | levels of the forecasts, int64 | steady means of the forecasts, int64
    | BLAKE2b digest of all before

A header without `errors` is from an older version, whose forecasts had one mean each.

Numbers are little-endian. Legend: L layers, N ranks, E experts, S = N*C slots.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout, check_shape
from megatron_laer.planner.service import Plan

_MAGIC = b"FSEPPLAN"
_FORMAT = 1
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_SLOT, _LEVEL = np.dtype("<i2"), np.dtype("<i8")

_KEYS = {
    "num_ranks": int,
    "capacity": int,
    "num_experts": int,
    "next_step": int,
    "version": int,
    "layers": list,
    "observed": list,
    "errors": list,
    "plans": list,
}
_PLAN_KEYS = {"source_step": int, "plan_ms": float}

_MAX_LAYERS = 2**16
_MAX_NAME = 200
# Far above the header of _MAX_LAYERS layers with long names.
_MAX_HEADER_BYTES = 2**26
_MAX_STEP = 2**62
# Sums of expected tokens stay exact in doubles, and far from overflow in int64.
_MAX_LEVEL_SUM = 2**52


@dataclass(frozen=True, eq=False)
class PlannerState:
    """State of one FSEP group's planner between two steps.

    Attributes:
        version: number of layout changes so far.
        layouts, forecasts: in force, one per layer.
        plans: complete, but not in force yet, oldest first; layers are indices into `layers`.
    """

    next_step: int
    version: int
    layers: tuple[str, ...]
    layouts: tuple[ExpertLayout, ...]
    forecasts: tuple[SmoothedForecast, ...]
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        _check_names(self.layers)
        for what, number in (("next_step", self.next_step), ("version", self.version)):
            _check_range(what, number, _MAX_STEP)
        if not len(self.layers) == len(self.layouts) == len(self.forecasts):
            raise ValueError(
                f"{len(self.layers)} layers with {len(self.layouts)} layouts and "
                f"{len(self.forecasts)} forecasts: there must be one each"
            )
        for forecast in self.forecasts:
            self._check_forecast(forecast)
        before = -1
        for plan in self.plans:
            _check_range("source_step", plan.source_step, self.next_step - 1)
            if plan.source_step <= before:
                raise ValueError(f"the plan of step {plan.source_step} comes after {before}'s")
            before = plan.source_step
            if not (math.isfinite(plan.plan_ms) and plan.plan_ms >= 0):
                raise ValueError(f"plan_ms must be a time, got {plan.plan_ms!r}")
            if list(plan.layouts) != list(range(len(self.layers))):
                raise ValueError(f"the plan of step {plan.source_step} lacks layers")
        shapes = {layout.shape for layout in self._all_layouts()}
        if len(shapes) != 1:
            raise ValueError(f"layouts differ in (ranks, capacity, experts): {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (N, C, E)."""
        return self.layouts[0].shape

    def check_fits(self, geometry: Geometry, layers: Sequence[str]) -> None:
        """Refuse a state of another run."""
        if self.shape != geometry.shape:
            found, here = _shape_text(self.shape), _shape_text(geometry.shape)
            raise ValueError(f"the state is of a group with {found}, this one has {here}")
        for layout in self._all_layouts():
            geometry.check_layout(layout)
        if self.layers != tuple(layers):
            raise ValueError(
                f"the state is of {_names_text(self.layers)}, this group has {_names_text(layers)}"
            )

    def to_bytes(self) -> bytes:
        num_ranks, capacity, num_experts = self.shape
        levels = [forecast.level_NE for forecast in self.forecasts]
        steady = [forecast.steady_NE for forecast in self.forecasts]
        header = {
            "num_ranks": num_ranks,
            "capacity": capacity,
            "num_experts": num_experts,
            "next_step": self.next_step,
            "version": self.version,
            "layers": list(self.layers),
            "observed": [level_NE is not None for level_NE in levels],
            "errors": [
                None if forecast.steady_NE is None else list(forecast.errors)
                for forecast in self.forecasts
            ],
            "plans": [
                {"source_step": plan.source_step, "plan_ms": float(plan.plan_ms)}
                for plan in self.plans
            ],
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        parts = [_PREFIX.pack(_MAGIC, _FORMAT, len(text)), text]
        parts += [layout.slot_bytes for layout in self._all_layouts()]
        parts += [
            mean_NE.astype(_LEVEL).tobytes() for mean_NE in levels + steady if mean_NE is not None
        ]
        body = b"".join(parts)
        return body + _digest(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> PlannerState:
        """Read and check the bytes of `to_bytes`; any others raise a ValueError."""
        if len(data) < _PREFIX.size + _DIGEST_BYTES:
            raise ValueError(
                f"has {len(data)} bytes, a planner's state has at least "
                f"{_PREFIX.size + _DIGEST_BYTES}"
            )
        # A view, because a state may have gigabytes.
        body = memoryview(data)[:-_DIGEST_BYTES]
        text_end = _PREFIX.size + _header_length(data)
        if _digest(body) != data[-_DIGEST_BYTES:]:
            raise ValueError("is damaged or cut off: its digest does not match")
        header, payload = _header(bytes(body[_PREFIX.size : text_end])), body[text_end:]
        num_ranks, capacity, num_experts = _header_shape(header)
        observed, plans = header["observed"], header["plans"]
        num_layers = len(header["layers"])
        slots_bytes = num_ranks * capacity * _SLOT.itemsize
        level_bytes = num_ranks * num_experts * _LEVEL.itemsize
        num_layouts = num_layers * (1 + len(plans))
        expected = _payload_bytes(header)
        if len(payload) != expected:
            raise ValueError(f"has {len(payload)} bytes of arrays, its header says {expected}")
        layouts = tuple(
            ExpertLayout(num_ranks, capacity, num_experts, bytes(payload[at : at + slots_bytes]))
            for at in range(0, num_layouts * slots_bytes, slots_bytes)
        )
        shape = num_ranks, num_experts
        means = [
            _read_only(np.frombuffer(payload[at : at + level_bytes], dtype=_LEVEL), shape)
            for at in range(num_layouts * slots_bytes, expected, level_bytes)
        ]
        levels, steady = iter(means[: sum(observed)]), iter(means[sum(observed) :])
        forecasts = [
            SmoothedForecast(
                level_NE=next(levels) if is_observed else None,
                steady_NE=next(steady) if errors is not None else None,
                errors=(0, 0) if errors is None else (errors[0], errors[1]),
            )
            for is_observed, errors in zip(observed, header["errors"], strict=True)
        ]
        return cls(
            next_step=header["next_step"],
            version=header["version"],
            layers=tuple(header["layers"]),
            layouts=layouts[:num_layers],
            forecasts=tuple(forecasts),
            plans=tuple(
                Plan(
                    plan["source_step"],
                    dict(enumerate(layouts[first : first + num_layers])),
                    plan["plan_ms"],
                )
                for plan, first in zip(
                    plans, range(num_layers, num_layouts, num_layers), strict=True
                )
            ),
        )

    @classmethod
    def from_file(cls, file: BinaryIO) -> PlannerState:
        """Read a state from a file; reject one longer than its header says without reading it."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = _header_length(file.read(_PREFIX.size))
        header = _header(file.read(length))
        expected = _PREFIX.size + length + _payload_bytes(header) + _DIGEST_BYTES
        if size > expected:
            raise ValueError(f"has {size} bytes, its header says {expected}")
        file.seek(0)
        return cls.from_bytes(file.read(expected))

    def _all_layouts(self) -> list[ExpertLayout]:
        """Return the layouts in force, then those of the plans."""
        made = [layout for plan in self.plans for layout in plan.layouts.values()]
        return [*self.layouts, *made]

    def _check_forecast(self, forecast: SmoothedForecast) -> None:
        if forecast.level_NE is None and forecast.steady_NE is not None:
            raise ValueError("a forecast has a steady mean, but no level")
        num_ranks, _, num_experts = self.shape
        for mean_NE in (forecast.level_NE, forecast.steady_NE):
            if mean_NE is None:
                continue
            if mean_NE.shape != (num_ranks, num_experts):
                raise ValueError(
                    f"a forecast has shape {mean_NE.shape}, expected {(num_ranks, num_experts)}"
                )
            if int(mean_NE.min()) < 0 or float(mean_NE.sum(dtype=np.float64)) > _MAX_LEVEL_SUM:
                raise ValueError("a forecast holds negative loads, or more than a step can have")


def _header_length(data: bytes) -> int:
    if len(data) < _PREFIX.size:
        raise ValueError(f"has {len(data)} bytes, a planner's state has at least {_PREFIX.size}")
    magic, number, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"is no planner's state: begins with {magic!r}, not {_MAGIC!r}")
    if number != _FORMAT:
        raise ValueError(f"has format {number}, this version reads format {_FORMAT}")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
    return int(length)


def _header(text: bytes) -> dict[str, Any]:
    """Return the header with checked types; errors are None for layers without a steady mean."""
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("has a header that is nested too deeply") from error
    if isinstance(header, dict) and isinstance(header.get("layers"), list):
        header.setdefault("errors", [None] * len(header["layers"]))
    _check_types("header", header, _KEYS)
    _check_names(header["layers"])
    if len(header["observed"]) != len(header["layers"]) or any(
        type(flag) is not bool for flag in header["observed"]
    ):
        raise ValueError("observed must be a list of truth values, one per layer")
    if len(header["errors"]) != len(header["layers"]) or not all(
        errors is None
        or (isinstance(errors, list) and [type(error) for error in errors] == [int, int])
        for errors in header["errors"]
    ):
        raise ValueError("errors must be a list of two integers or null, one per layer")
    for plan in header["plans"]:
        _check_types("plan", plan, _PLAN_KEYS)
    checked: dict[str, Any] = header
    return checked


def _read_only(mean: np.ndarray[Any, Any], shape: tuple[int, int]) -> Int64:
    mean_NE = mean.astype(np.int64).reshape(shape)
    mean_NE.setflags(write=False)
    return mean_NE


def _header_shape(header: dict[str, Any]) -> tuple[int, int, int]:
    shape = header["num_ranks"], header["capacity"], header["num_experts"]
    check_shape(*shape)
    return shape


def _payload_bytes(header: dict[str, Any]) -> int:
    """Return the size of the arrays: layouts in force and of each plan, and forecasts."""
    num_ranks, capacity, num_experts = _header_shape(header)
    num_layouts = len(header["layers"]) * (1 + len(header["plans"]))
    num_levels = sum(map(bool, header["observed"]))
    num_levels += sum(errors is not None for errors in header["errors"])
    slots_bytes = num_ranks * capacity * _SLOT.itemsize
    return num_layouts * slots_bytes + num_levels * num_ranks * num_experts * _LEVEL.itemsize


def _check_types(what: str, found: object, wanted: dict[str, type]) -> None:
    """Require exactly these keys with exactly these types (a bool is not an int)."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must have {_types_text(wanted)}, got a {type(found).__name__}")
    types = {key: type(value) for key, value in found.items()}
    if types != wanted:
        raise ValueError(f"{what} must have {_types_text(wanted)}, got {_types_text(types)}")


def _check_names(names: Sequence[object]) -> None:
    if not all(isinstance(name, str) and 1 <= len(name) <= _MAX_NAME for name in names):
        raise ValueError(f"layer names must be texts of 1 to {_MAX_NAME} characters")
    if not 1 <= len(names) <= _MAX_LAYERS or len(set(names)) != len(names):
        raise ValueError(f"layers must be 1 to {_MAX_LAYERS} different names, got {len(names)}")


def _check_range(what: str, number: int, highest: int) -> None:
    if not 0 <= number <= highest:
        raise ValueError(f"{what} must be in 0..{highest}, got {number}")


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _shape_text(shape: tuple[int, int, int]) -> str:
    return "N = {} ranks, C = {} slots and E = {} experts".format(*shape)


def _names_text(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return " and ".join(names)
    return f"{len(names)} layers, {names[0]} to {names[-1]}"


def _types_text(wanted: dict[str, type]) -> str:
    return ", ".join(f"{key} ({kind.__name__})" for key, kind in wanted.items())
