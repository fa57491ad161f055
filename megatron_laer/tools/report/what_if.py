"""What-if rows: other capacities and plan modes on a run's routing, by `plan`'s own code.

Each row has the command that prints it again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_laer.config import FSEPConfig
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES
from megatron_laer.tools.simulator.comparison import TOLERANCE, PlanRow, chosen_cases, simulate
from megatron_laer.tools.simulator.run_settings import RunSettings
from megatron_laer.tools.traces.records import Trace

_STRATEGY = FSEPConfig().planner


@dataclass(frozen=True)
class WhatIf:
    """Row of `plan`, whose `layer_ms` includes fresh layouts; `command` prints it again.

    `mode` has the tolerance, if any.
    """

    row: PlanRow
    mode: str
    command: str


def what_if(
    path: str,
    trace: Trace,
    geometry: Geometry,
    settings: RunSettings,
    most_cases: int,
    flags: Sequence[str] = (),
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    iterations: range | None = None,
) -> list[WhatIf]:
    """Compute rows from at most `most_cases` microbatches; none for a trace of one step.

    A run with a tolerance has it as a mode more. `path` and `flags` are for the printed commands.
    """
    if most_cases == 0 or not trace.counts_RNE.any() or len(set(trace.step_R.tolist())) < 2:
        return []
    cases = len(chosen_cases(trace, 1, iterations))
    every = -(-cases // most_cases)
    while math.gcd(every, cases) > 1 and every < cases:  # such a stride would miss layers
        every += 1
    tolerance, homes = settings.tolerance, geometry.home_slots
    least = homes + 1 if homes else -(-geometry.num_experts // geometry.num_ranks)
    around = (geometry.capacity - 1, geometry.capacity, geometry.capacity + 1)
    shapes = [
        replace(geometry, capacity=slots)
        for slots in around
        if least <= slots <= geometry.num_experts
    ]
    rows = simulate(
        trace,
        settings.priced(trace, shapes),
        [_STRATEGY],
        [mode.value for mode in GUARD_MODES] + [TOLERANCE] * (tolerance is not None),
        tolerance=tolerance or 0.0,
        every=every,
        iterations=iterations,
        progress=progress,
    )
    return [
        WhatIf(
            row,
            f"{row.mode} {tolerance}" if row.mode == TOLERANCE else row.mode,
            _command(path, geometry, tolerance, flags, every, row),
        )
        for row in rows
    ]


def _command(
    path: str,
    geometry: Geometry,
    tolerance: float | None,
    flags: Sequence[str],
    every: int,
    row: PlanRow,
) -> str:
    """Return the command that prints this row; every command prints stock's row first.

    It reads the run's other settings from the metrics next to the trace.
    """
    is_stock = row.strategy != _STRATEGY
    capacity = geometry.capacity if is_stock else row.capacity
    mode = GUARD_MODES[0].value if is_stock else row.mode
    words = [
        *("python", "-m", "megatron_laer", "plan", path),
        *("--capacity", str(capacity), "--strategy", _STRATEGY, "--mode", mode),
        *("--node-size", str(geometry.node_size)),
        *(("--tolerance", str(tolerance)) if mode == TOLERANCE else ()),
        *flags,
        *(("--every", str(every)) if every > 1 else ()),
    ]
    return shlex.join(words)
