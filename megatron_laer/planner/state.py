"""State of a planner between steps, and its format in a checkpoint: `files.records` of three kinds.

Records of `plan` have the complete plans that are not in force yet, oldest first. Then each layer
has one, of the step that is next: the slots in force and its forecast, `smoothed` or `window`. The
bytes are not trusted: every size and range is checked, and nothing is unpickled.

Legend: N ranks, C slots per rank, E experts, L layers, K counts that a forecast keeps.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files.checks import quoted
from megatron_laer.files.records import (
    MAX_RANKS,
    MAX_STEP,
    OPEN,
    Field,
    Format,
    Records,
    check_shape,
)
from megatron_laer.planner.forecast import WINDOW, Forecast, SmoothedForecast, WindowForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import MAX_EXPERTS, ExpertLayout
from megatron_laer.planner.service import Plan

# Sums of expected tokens stay exact in doubles, and far from overflow in int64.
_MAX_LEVEL_SUM = 2**52

_RUN = re.compile("[0-9a-f]{16}")

_SLOTS = Field("slots_NC", "<i2", ("num_ranks", "capacity"))
_KEPT = Field("kept_KNE", "<i8", (OPEN, "num_ranks", "num_experts"), _MAX_LEVEL_SUM)
STATE = Format(
    "megatron_laer-planner",
    "planner's state",
    "bin",
    {"num_ranks": MAX_RANKS, "num_experts": MAX_EXPERTS, "capacity": MAX_RANKS},
    {
        "plan": (
            Field("plan_ms", "<f8"),
            Field("slots_LNC", "<i2", ("layers", "num_ranks", "capacity")),
        ),
        "smoothed": (_SLOTS, Field("errors", "<i8", (2,)), _KEPT),
        "window": (_SLOTS, _KEPT),
    },
)


@dataclass(frozen=True, eq=False)
class PlannerState:
    """State of one FSEP group's planner between two steps.

    Attributes:
        version: number of layout changes so far.
        layouts, forecasts: in force, one per layer.
        plans: complete, but not in force yet, oldest first.
        run: number of the run, as in its recordings; None if it was saved by an older release.
    """

    next_step: int
    version: int
    layers: tuple[str, ...]
    layouts: tuple[ExpertLayout, ...]
    forecasts: tuple[Forecast, ...]
    plans: tuple[Plan, ...]
    run: str | None = None

    def __post_init__(self) -> None:
        check_shape({}, [*self.layers])
        for what, number in (("next_step", self.next_step), ("version", self.version)):
            if type(number) is not int or not 0 <= number <= MAX_STEP:
                raise ValueError(f"{what} must be in 0..{MAX_STEP}, got {number}")
        if self.run is not None and not (type(self.run) is str and _RUN.fullmatch(self.run)):
            raise ValueError(f"run must be 16 hexadecimal digits, got {quoted(self.run)}")
        if not len(self.layers) == len(self.layouts) == len(self.forecasts):
            raise ValueError(
                f"{len(self.layers)} layers with {len(self.layouts)} layouts and "
                f"{len(self.forecasts)} forecasts: there must be one each"
            )
        steps = [plan.source_step for plan in self.plans]
        if steps != sorted({*steps}) or not all(0 <= step < self.next_step for step in steps):
            raise ValueError(f"plans must be of different steps before the next one, got {steps}")
        for plan in self.plans:
            if not (math.isfinite(plan.plan_ms) and plan.plan_ms >= 0):
                raise ValueError(f"plan_ms must be a time, got {plan.plan_ms!r}")
            if len(plan.layouts) != len(self.layers):
                raise ValueError(f"the plan of step {plan.source_step} lacks layers")
        shapes = {layout.shape for layout in self._all_layouts()}
        if len(shapes) != 1:
            raise ValueError(f"layouts differ in (ranks, capacity, experts): {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (N, C, E)."""
        return self.layouts[0].shape

    def check_fits(self, geometry: Geometry, layers: Sequence[str], run: str | None = None) -> None:
        """Refuse a state of another model, or of another run than the checkpoint's, if known."""
        if self.run is not None and run is not None and self.run != run:
            raise ValueError(
                f"the state is of run {self.run}, the checkpoint's weights of run {run}"
            )
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
        fields = {
            "num_ranks": num_ranks,
            "capacity": capacity,
            "num_experts": num_experts,
            "next_step": self.next_step,
            "layout_version": self.version,
            "plans": len(self.plans),
            "layers": [*self.layers],
        }
        if self.run is not None:
            fields["run"] = self.run
        records = Records(STATE, fields)
        made = enumerate(self._records(), start=1)
        return records.line + b"".join(
            records.encode(kind, number, step, values) for number, (kind, step, values) in made
        )

    def _records(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        for plan in self.plans:
            slots_LNC = [_slots_NC(layout) for layout in plan.layouts]
            yield "plan", plan.source_step, {"plan_ms": plan.plan_ms, "slots_LNC": slots_LNC}
        num_ranks, _, num_experts = self.shape
        for layout, forecast in zip(self.layouts, self.forecasts, strict=True):
            values = {
                "slots_NC": _slots_NC(layout),
                "kept_KNE": np.reshape(forecast.kept, (-1, num_ranks, num_experts)),
            }
            if isinstance(forecast, SmoothedForecast):
                yield "smoothed", self.next_step, values | {"errors": forecast.errors}
            else:
                yield "window", self.next_step, values

    @classmethod
    def from_bytes(cls, data: bytes) -> PlannerState:
        return cls.from_file(io.BytesIO(data))

    @classmethod
    def from_file(cls, file: BinaryIO) -> PlannerState:
        """Read and check a whole file; any but that of `to_bytes` raises a ValueError."""
        path = Path("the state")
        records = Records.of(file, path, STATE)
        names = "next_step", "layout_version", "plans", "run"
        fields: dict[str, Any] = dict.fromkeys(names)
        fields |= records.fields
        plans = list[Plan]()
        layouts, forecasts = list[ExpertLayout](), list[Forecast]()

        def layout(slots_NC: np.ndarray[Any, Any]) -> ExpertLayout:
            num_ranks, capacity = slots_NC.shape
            return ExpertLayout(num_ranks, capacity, fields["num_experts"], slots_NC.tobytes())

        for frame, values in records.read(file, path, must_be_whole=True):
            if frame.kind == "plan":
                made = tuple(map(layout, values["slots_LNC"]))
                plans.append(Plan(frame.step, made, values["plan_ms"]))
            else:
                layouts.append(layout(values["slots_NC"]))
                forecasts.append(_forecast(values["kept_KNE"], values.get("errors")))
        if len(plans) != fields["plans"]:
            raise ValueError(f"{path} has {len(plans)} plans of {fields['plans']}")
        return cls(
            next_step=fields["next_step"],
            version=fields["layout_version"],
            layers=tuple(fields["layers"]),
            layouts=tuple(layouts),
            forecasts=tuple(forecasts),
            plans=tuple(plans),
            run=fields["run"],
        )

    def _all_layouts(self) -> list[ExpertLayout]:
        """Return the layouts in force, then those of the plans."""
        made = [layout for plan in self.plans for layout in plan.layouts]
        return [*self.layouts, *made]


def _forecast(kept_KNE: Int64, errors: Int64 | None) -> Forecast:
    if len(kept_KNE) > WINDOW:
        raise ValueError(f"a forecast keeps {len(kept_KNE)} counts, at most {WINDOW}")
    if (kept_KNE.sum(axis=(1, 2), dtype=np.float64) > _MAX_LEVEL_SUM).any():
        raise ValueError("a forecast must hold the loads of one step, these are too large")
    kept = tuple(kept_KNE.astype(np.int64))
    for kept_NE in kept:
        kept_NE.setflags(write=False)
    if errors is None:
        return WindowForecast(kept)
    quick, steady = errors.tolist()
    return SmoothedForecast(kept, (quick, steady))


def _slots_NC(layout: ExpertLayout) -> np.ndarray[Any, Any]:
    return layout.slot_expert_S.reshape(layout.num_ranks, layout.capacity)


def _shape_text(shape: tuple[int, int, int]) -> str:
    return "N = {} ranks, C = {} slots and E = {} experts".format(*shape)


def _names_text(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return " and ".join(names)
    return f"{len(names)} layers, {names[0]} to {names[-1]}"
