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
from megatron_laer.files.checks import open_input
from megatron_laer.planner.forecast import WINDOW, SmoothedForecast
from megatron_laer.telemetry.trace_file import MAX_COUNT


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
        # In the order of the file's axes, except ranks, which come after microbatches.
        self.counts: npt.NDArray[np.int64] = _read_tokens(path).transpose(0, 1, 3, 2, 4).copy()
        if not self.counts.any(axis=(3, 4)).all():
            raise ValueError(f"{path} has a microbatch without tokens")
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

    def newest(self, case: Case) -> Int64:
        """Sum the newest microbatches before the case's iteration, as the paper's planner does."""
        earlier = self.counts[max(0, case.iteration - WINDOW) : case.iteration, case.layer]
        newest_NE: Int64 = earlier.reshape(-1, *earlier.shape[2:])[-WINDOW:].sum(axis=0)
        return newest_NE

    def before(self, case: Case) -> Int64 | None:
        if case.microbatch == 0:
            return None
        counts_NE: Int64 = self.counts[case.iteration, case.layer, case.microbatch - 1]
        return counts_NE


def _read_tokens(path: Path) -> npt.NDArray[np.int64]:
    if not path.exists():
        raise ValueError(f"trace {str(path)!r} does not exist; give an npz file")
    try:
        with open_input(path) as file, np.load(file) as arrays:
            tokens = arrays["tokens"]
    # `zipfile` and NumPy raise many exceptions for damaged files.
    except Exception as error:
        raise ValueError(f"{path} is not a trace in npz: {error}") from error
    if tokens.ndim != 5 or tokens.dtype.kind not in "iu" or 0 in tokens.shape:
        raise ValueError(
            f"{path}: tokens are {tokens.dtype} of shape {tokens.shape}, expected integers "
            "[iterations, layers, ranks, microbatches, experts]"
        )
    counts: npt.NDArray[np.int64] = tokens.astype(np.int64)
    if counts.min() < 0 or counts.max() > MAX_COUNT:
        raise ValueError(
            f"{path}: tokens must be in 0..{MAX_COUNT}, got {counts.min()} to {counts.max()}"
        )
    return counts
