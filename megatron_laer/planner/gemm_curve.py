"""Speed of one rank's GEMMs by their tokens, from the constants of a cluster's file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64

_Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GemmCurve:
    """Speed of one rank by tokens per GEMM, as points (tokens, achieved FLOP/s).

    From each point to the next, tokens increase and time does not decrease.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a GEMM curve needs at least one point [tokens, FLOP/s], got none")
        for tokens, flops_per_s in self.points:
            if tokens < 1 or not 0 < flops_per_s < math.inf:
                raise ValueError(
                    f"GEMM point [{tokens}, {flops_per_s}]: tokens must be at least 1 and FLOP/s "
                    "positive and finite"
                )
        for (fewer, slow), (more, fast) in pairwise(self.points):
            if more <= fewer:
                raise ValueError(
                    f"GEMM points must have increasing tokens, got {more} after {fewer}"
                )
            if more / fast < fewer / slow:
                raise ValueError(
                    f"GEMM points [{fewer}, {slow}] and [{more}, {fast}] take less time for more "
                    f"tokens; at {more} tokens at most {more * slow / fewer:.3e} FLOP/s fit"
                )

    def unit_seconds(self, tokens: Int64) -> npt.NDArray[np.float64]:
        """Return the seconds of GEMMs that need one FLOP per token; multiply by the real FLOPs.

        Linear in time between points; beyond the last one at its speed, below the first one as long
        as there, zero without tokens. Never less for more tokens. Element by element, so equal on
        every machine.
        """
        tokens_P, seconds_P, slope_P, limit_P = self._table
        point = np.maximum(np.searchsorted(tokens_P, tokens, side="right") - 1, 0)
        above = np.maximum(tokens - tokens_P[point], 0)
        seconds = np.minimum(seconds_P[point] + above * slope_P[point], limit_P[point])
        return np.where(tokens > 0, seconds, 0.0)

    def times(self, factor: float) -> GemmCurve:
        """Return the curve of a rank that is faster by this factor."""
        return GemmCurve(tuple((tokens, speed * factor) for tokens, speed in self.points))

    def columns(self) -> tuple[Int64, _Float64, _Float64, _Float64, _Float64]:
        """Return the table and the highest speed up to each point, for the native cost model."""
        return (*self._table, self._best_P)

    @cached_property
    def _best_P(self) -> _Float64:
        return np.maximum.accumulate([flops_per_s for _, flops_per_s in self.points])

    @cached_property
    def _table(self) -> tuple[Int64, _Float64, _Float64, _Float64]:
        """Return per point: tokens, seconds, seconds per token beyond, seconds at the next one."""
        tokens_P = np.array([tokens for tokens, _ in self.points], dtype=np.int64)
        seconds_P = np.array([tokens / speed for tokens, speed in self.points])
        slope_P = np.empty_like(seconds_P)
        slope_P[:-1] = (seconds_P[1:] - seconds_P[:-1]) / (tokens_P[1:] - tokens_P[:-1])
        slope_P[-1] = 1.0 / self.points[-1][1]
        return tokens_P, seconds_P, slope_P, np.append(seconds_P[1:], math.inf)
