"""State of a planner between steps, and its bytes in a checkpoint.

The bytes are not trusted: the digest, then every size and range are checked. Nothing is unpickled.

    magic, format, length of the header | header, JSON
    | slots in force, slots of the plans, int16
    | counts that the forecasts keep, int64
    | BLAKE2b digest of all before

Numbers are little-endian. Legend: L layers, N ranks, E experts, S = N*C slots.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import Forecast, SmoothedForecast, WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan
from megatron_laer.planner.state_header import (
    FORMAT,
    LEVEL,
    MAGIC,
    MAX_STEP,
    PREFIX,
    SLOT,
    check_names,
    check_range,
    header_length,
    header_shape,
    payload_bytes,
    read_header,
)

_DIGEST_BYTES = 32
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
    forecasts: tuple[Forecast, ...]
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        check_names(self.layers)
        for what, number in (("next_step", self.next_step), ("version", self.version)):
            check_range(what, number, MAX_STEP)
        if not len(self.layers) == len(self.layouts) == len(self.forecasts):
            raise ValueError(
                f"{len(self.layers)} layers with {len(self.layouts)} layouts and "
                f"{len(self.forecasts)} forecasts: there must be one each"
            )
        for forecast in self.forecasts:
            self._check_forecast(forecast)
        before = -1
        for plan in self.plans:
            check_range("source_step", plan.source_step, self.next_step - 1)
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
        header = {
            "num_ranks": num_ranks,
            "capacity": capacity,
            "num_experts": num_experts,
            "next_step": self.next_step,
            "version": self.version,
            "layers": list(self.layers),
            "kept": [len(forecast.kept) for forecast in self.forecasts],
            "errors": [
                list(forecast.errors) if isinstance(forecast, SmoothedForecast) else None
                for forecast in self.forecasts
            ],
            "plans": [
                {"source_step": plan.source_step, "plan_ms": float(plan.plan_ms)}
                for plan in self.plans
            ],
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        parts = [PREFIX.pack(MAGIC, FORMAT, len(text)), text]
        parts += [layout.slot_bytes for layout in self._all_layouts()]
        parts += [
            kept_NE.astype(LEVEL).tobytes()
            for forecast in self.forecasts
            for kept_NE in forecast.kept
        ]
        body = b"".join(parts)
        return body + _digest(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> PlannerState:
        """Read and check the bytes of `to_bytes`; any others raise a ValueError."""
        if len(data) < PREFIX.size + _DIGEST_BYTES:
            raise ValueError(
                f"has {len(data)} bytes, a planner's state has at least "
                f"{PREFIX.size + _DIGEST_BYTES}"
            )
        # A view, because a state may have gigabytes.
        body = memoryview(data)[:-_DIGEST_BYTES]
        text_end = PREFIX.size + header_length(data)
        if _digest(body) != data[-_DIGEST_BYTES:]:
            raise ValueError("is damaged or cut off: its digest does not match")
        header, payload = read_header(bytes(body[PREFIX.size : text_end])), body[text_end:]
        num_ranks, capacity, num_experts = header_shape(header)
        plans = header["plans"]
        num_layers = len(header["layers"])
        slots_bytes = num_ranks * capacity * SLOT.itemsize
        level_bytes = num_ranks * num_experts * LEVEL.itemsize
        num_layouts = num_layers * (1 + len(plans))
        expected = payload_bytes(header)
        if len(payload) != expected:
            raise ValueError(f"has {len(payload)} bytes of arrays, its header says {expected}")
        layouts = tuple(
            ExpertLayout(num_ranks, capacity, num_experts, bytes(payload[at : at + slots_bytes]))
            for at in range(0, num_layouts * slots_bytes, slots_bytes)
        )
        shape = num_ranks, num_experts
        arrays = iter(
            _read_only(np.frombuffer(payload[at : at + level_bytes], dtype=LEVEL), shape)
            for at in range(num_layouts * slots_bytes, expected, level_bytes)
        )
        forecasts = [
            _forecast(tuple(islice(arrays, kept)), errors)
            for kept, errors in zip(header["kept"], header["errors"], strict=True)
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
        length = header_length(file.read(PREFIX.size))
        header = read_header(file.read(length))
        expected = PREFIX.size + length + payload_bytes(header) + _DIGEST_BYTES
        if size > expected:
            raise ValueError(f"has {size} bytes, its header says {expected}")
        file.seek(0)
        return cls.from_bytes(file.read(expected))

    def _all_layouts(self) -> list[ExpertLayout]:
        """Return the layouts in force, then those of the plans."""
        made = [layout for plan in self.plans for layout in plan.layouts.values()]
        return [*self.layouts, *made]

    def _check_forecast(self, forecast: Forecast) -> None:
        num_ranks, _, num_experts = self.shape
        for kept_NE in forecast.kept:
            if kept_NE.shape != (num_ranks, num_experts):
                raise ValueError(
                    f"a forecast has shape {kept_NE.shape}, expected {(num_ranks, num_experts)}"
                )
            if int(kept_NE.min()) < 0 or float(kept_NE.sum(dtype=np.float64)) > _MAX_LEVEL_SUM:
                raise ValueError("a forecast holds negative loads, or more than a step can have")


def _forecast(kept: tuple[Int64, ...], errors: list[int] | None) -> Forecast:
    if errors is None:
        return WindowForecast(kept)
    if len(kept) not in (0, 2):
        raise ValueError(f"a forecast with errors must keep two means or none, got {len(kept)}")
    level_NE, steady_NE = kept or (None, None)
    return SmoothedForecast(None, level_NE, steady_NE, (errors[0], errors[1]))


def _read_only(mean: np.ndarray[Any, Any], shape: tuple[int, int]) -> Int64:
    mean_NE = mean.astype(np.int64).reshape(shape)
    mean_NE.setflags(write=False)
    return mean_NE


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _shape_text(shape: tuple[int, int, int]) -> str:
    return "N = {} ranks, C = {} slots and E = {} experts".format(*shape)


def _names_text(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return " and ".join(names)
    return f"{len(names)} layers, {names[0]} to {names[-1]}"
