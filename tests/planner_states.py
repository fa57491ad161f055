"""A planner's state of made-up forecasts and plans, for the tests of its file.

Legend: N ranks, C slots per rank, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_laer.planner.forecast import SmoothedForecast, WindowForecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan
from megatron_laer.planner.state import PlannerState

N, C, E = 4, 3, 6
LAYERS = ("layer 2", "layer 3", "mtp 1")


def layouts(seed: int) -> tuple[ExpertLayout, ...]:
    return tuple(ExpertLayout.random(N, C, E, (seed, layer)) for layer in range(len(LAYERS)))


def make_state(**changes: Any) -> PlannerState:
    counts = np.random.default_rng(0).integers(0, 1000, (2, N, E))
    observed = SmoothedForecast().observe(counts[0]).observe(counts[1])
    state = PlannerState(
        next_step=8,
        version=5,
        layers=LAYERS,
        layouts=layouts(0),
        forecasts=(
            *(observed, SmoothedForecast()),
            WindowForecast().observe(counts).observe(counts[0]),
        ),
        plans=tuple(Plan(step, layouts(step), 1.5 * step) for step in (6, 7)),
    )
    return dataclasses.replace(state, **changes)
