"""Cases of the balance benchmarks: counts from a trace, and the earlier counts for forecasts.

The trace is an npz file with tokens [iterations, layers, ranks, microbatches, experts].

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.tools.traces import read_trace


@dataclass(frozen=True)
class Case:
    """Place of a case's counts in a trace."""

    iteration: int
    layer: int
    microbatch: int


class Trace:
    """Counts of every case of a trace, and forecasts from earlier ones.

    Raises ValueError for a missing file or a microbatch without tokens.
    """

    def __init__(self, path: Path) -> None:
        trace = read_trace(path, "npz")
        if not trace.counts_RNE.any(axis=(1, 2)).all():
            raise ValueError(f"{path} has a microbatch without tokens")
        shape = len(trace.layers), int(trace.microbatch_R.max()) + 1, *trace.counts_RNE.shape[1:]
        # In the order of the file's axes, except ranks, which come after microbatches.
        self.counts: npt.NDArray[np.int64] = trace.counts_RNE.astype(np.int64).reshape(-1, *shape)
        self._forecasts: dict[int, list[SmoothedForecast]] = {}

    def cases(self, stride: int, offset: int) -> list[Case]:
        iterations, layers, count = self.counts.shape[:3]
        every = [
            Case(iteration, layer, microbatch)
            for iteration in range(1, iterations)
            for layer in range(layers)
            for microbatch in range(count)
        ]
        return every[offset::stride]

    def now(self, case: Case) -> Int64:
        counts_NE: Int64 = self.counts[case.iteration, case.layer, case.microbatch]
        return counts_NE

    def forecast(self, case: Case) -> Int64:
        """Forecast the case from all iterations before its own."""
        if case.layer not in self._forecasts:
            state = SmoothedForecast()
            states = []
            for iteration in range(self.counts.shape[0]):
                state = state.observe(self.counts[iteration, case.layer].sum(axis=0))
                states.append(state)
            self._forecasts[case.layer] = states
        return self._forecasts[case.layer][case.iteration - 1].counts_NE()

    def before(self, case: Case) -> Int64 | None:
        if case.microbatch == 0:
            return None
        counts_NE: Int64 = self.counts[case.iteration, case.layer, case.microbatch - 1]
        return counts_NE
