"""This file estimates roughly, before any work, how much time and memory a plan would take.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.config import PlanMode, Split
from megatron_laer.files import memory
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.strategies import TimeTerms, plan_time
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools.simulator.table import BASELINES, chosen_cases, split_of

# What follows the gate, measured as the times of strategies were (`planner/strategies.py`).
EVEN_GATE = TimeTerms(3e-4, 1e-6, 5e-7)
FORECAST_GATE = TimeTerms(3e-4, 2e-6, 3e-8)
FRESH_GATE = TimeTerms(5e-4, 3e-6, 1e-7)
# One microbatch of a workload.
DRAWN = TimeTerms(6e-3, 0.0, 1.5e-7)

# Bytes per count while one case is evaluated, measured likewise; and what is kept: the trace's
# counts, the forecasts with two means each.
_WORKING_BYTES = 170
_TRACE_BYTES, _FORECAST_BYTES = 4, 16


@dataclass(frozen=True)
class Work:
    """Holds what a plan has to go through.

    Attributes:
        geometries: one per capacity.
        records: of the trace, which are all kept.
        layers: each with forecasts of its own.
        plans: layouts that every strategy makes: one for each layer and step.
        cases: microbatches that are evaluated.
    """

    geometries: Sequence[Geometry]
    strategies: Sequence[str]
    modes: Sequence[str]
    records: int
    layers: int
    plans: int
    cases: int
    lag: int

    @property
    def seconds(self) -> float:
        """Return the processor time of the whole plan."""
        total = 0.0
        for geometry in self.geometries:
            for strategy in self.strategies:
                total += self.plans * plan_time(strategy).seconds(geometry)
                for mode in [PlanMode.FORECAST] if strategy in BASELINES else self.modes:
                    fresh = FORECAST_GATE if mode == PlanMode.FORECAST else FRESH_GATE
                    gate = EVEN_GATE if split_of(strategy) == Split.EVEN else fresh
                    total += self.cases * gate.seconds(geometry)
        return total

    @property
    def bytes(self) -> int:
        """Return the most memory that the plan takes."""
        geometry = self.geometries[0]
        forecasts = _FORECAST_BYTES * self.layers * (self.lag + 1)
        each = _TRACE_BYTES * self.records + forecasts + _WORKING_BYTES
        return geometry.num_ranks * geometry.num_experts * each


def work_of(
    trace: Trace,
    geometries: Sequence[Geometry],
    strategies: Sequence[str],
    modes: Sequence[str],
    *,
    lag: int,
    every: int,
) -> Work:
    """Count what `simulate` will go through for the same arguments."""
    cases = chosen_cases(trace, lag, every)
    keys = {(int(trace.step_R[case]), int(trace.layer_R[case])) for case in cases}
    return Work(
        geometries=geometries,
        strategies=strategies,
        modes=modes,
        records=len(trace),
        layers=len(trace.layers),
        plans=len(keys),
        cases=len(cases),
        lag=lag,
    )


def check_drawing(records: int, geometry: Geometry, longest_hours: float) -> None:
    """Refuse a workload of so many microbatches that would take longer to draw.

    Raises:
        ValueError: with the estimate.
    """
    hours = records * DRAWN.seconds(geometry) / 3600
    if hours > longest_hours:
        raise ValueError(
            f"drawing {records:,} microbatches for {geometry.num_ranks:,} ranks would take about "
            f"{hours:.2g} hours, more than the {longest_hours:.2g} of --hours; give fewer --steps "
            f"or --ranks, or --hours {hours * 1.1:.2g}"
        )


def check_fits(work: Work, longest_hours: float) -> None:
    """Refuse a plan that would take longer, or more memory than is free.

    Raises:
        ValueError: with the estimate and with what would fit.
    """
    num_ranks = work.geometries[0].num_ranks
    what = f"planning {work.cases:,} cases for {num_ranks:,} ranks"
    share = memory.available_bytes() / max(work.bytes, 1)
    memory.check_enough(work.bytes, what, f"give --ranks of at most {int(num_ranks * share):,}")
    hours = work.seconds / 3600
    if hours > longest_hours:
        ratio = hours / longest_hours
        ways = [f"--every {math.ceil(ratio)}"] if work.cases > ratio else []
        ways += [f"--ranks of about {int(num_ranks / ratio):,}"] if num_ranks > ratio else []
        raise ValueError(
            f"{what} would take about {hours:.2g} hours, more than the {longest_hours:.2g} of "
            f"--hours; give {', '.join([*ways, 'fewer --strategy'])}, or --hours {hours * 1.1:.2g}"
        )
