"""Forecasts of the next counts: pure values, updated with observed counts.

`SmoothedForecast` is the one to use, with weights from the data in `docs/internals/planner.md`;
`WindowForecast` is the paper's.

Legend: N ranks, E experts, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from megatron_laer.arrays import Int64

# Units per token, so that experts with less than one expected token keep their order.
_SCALE = 16

# Weights of the newest counts. In a training run loads drift, so the newest steps are the best
# guide. With a fixed router and text of one kind, steps differ by chance, which a longer memory
# averages out.
QUICK_WEIGHT, STEADY_WEIGHT = 0.75, 0.25
# Each step forgets one part in this many of the older error, so that errors add up to as many times
# the usual one.
_FORGOTTEN = 4
# An error this many times the usual one is a jump.
_JUMP = 2
# Microbatches whose counts the paper's planner sums.
WINDOW = 5
# Keeps errors, also those of a checkpoint, far from overflow in int64.
MAX_ERROR = 2**58


class Forecast(Protocol):
    """Forecast of counts, as a pure value."""

    @property
    def kept(self) -> tuple[Int64, ...]:
        """Return the counts of the state, int64 [N, E] each; none before an observation."""
        ...

    def observe(self, counts_NE: Int64) -> Self:
        """Return the state after one more observation; observations come oldest first."""
        ...

    def changed(self, change: Callable[[Int64], Int64]) -> Self:
        """Return the state with changed counts, such as renumbered experts."""
        ...

    def counts_NE(self) -> Int64:
        """Return expected loads, int64 [N, E], in any unit: only their proportions matter."""
        ...


@dataclass(frozen=True, eq=False)
class SmoothedForecast:
    """Exponential mean with a short or a long memory, by their recent errors.

    There are two means, of weights 0.75 and 0.25. Each observation adds to each mean's error the
    tokens that it expected at wrong experts; a quarter of the older error is forgotten. The mean
    with the smaller error is the forecast. Counts further from both means than twice their usual
    error are a jump, such as a change of text: both means start anew from them.

    Attributes:
        kept: the quick and the steady mean, in 1/16 tokens, int64 [N, E]; none at the start.
        errors: tokens at wrong experts, in 1/16 tokens, of the quick and of the steady mean.
    """

    kept: tuple[Int64, ...] = ()
    errors: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if len(self.kept) not in (0, 2) or any(
            mean.ndim != 2 or mean.dtype != np.int64 for mean in self.kept
        ):
            found = [f"{mean.dtype} of shape {mean.shape}" for mean in self.kept]
            raise ValueError(f"kept must be two means, int64 [N, E], or none, got {found}")
        if not all(0 <= error <= MAX_ERROR for error in self.errors):
            raise ValueError(f"errors must be in 0..{MAX_ERROR}, got {self.errors}")

    def changed(self, change: Callable[[Int64], Int64]) -> SmoothedForecast:
        return replace(self, kept=tuple(map(change, self.kept)))

    def observe(self, counts_NE: Int64) -> SmoothedForecast:
        """Return the state after one more step, whose counts are the sum of its microbatches'."""
        new_NE = counts_NE.astype(np.int64) * _SCALE
        new_NE.setflags(write=False)
        if not self.kept:
            return SmoothedForecast((new_NE, new_NE))
        if self.kept[0].shape != new_NE.shape:
            raise ValueError(
                f"counts_NE has shape {new_NE.shape}, observed before were {self.kept[0].shape}"
            )
        missed = [_error(mean_NE, new_NE) for mean_NE in self.kept]
        both = [*zip(missed, self.errors, strict=True)]
        if all(miss * _FORGOTTEN > error * _JUMP > 0 for miss, error in both):
            return SmoothedForecast((new_NE, new_NE), self.errors)
        # The first error also stands for those before it.
        quick, steady = (
            min(error - error // _FORGOTTEN + miss if error else miss * _FORGOTTEN, MAX_ERROR)
            for miss, error in both
        )
        quick_NE, steady_NE = self.kept
        means = _mean(quick_NE, new_NE, QUICK_WEIGHT), _mean(steady_NE, new_NE, STEADY_WEIGHT)
        return SmoothedForecast(means, (quick, steady))

    def counts_NE(self) -> Int64:
        """Return expected loads, int64 [N, E], in 1/16 tokens."""
        if not self.kept:
            raise ValueError("nothing was observed yet; call observe first")
        quick_NE, steady_NE = self.kept
        return steady_NE if self.errors[1] < self.errors[0] else quick_NE


def _mean(before_NE: Int64, new_NE: Int64, weight: float) -> Int64:
    # One product and one rounding per element: the same on every machine.
    mean_NE: Int64 = before_NE + np.rint((new_NE - before_NE) * weight).astype(np.int64)
    mean_NE.setflags(write=False)
    return mean_NE


def _error(expected_NE: Int64, new_NE: Int64) -> int:
    """Return the tokens expected at wrong experts, over all ranks: these unbalance ranks."""
    return int(np.abs(expected_NE.sum(axis=0) - new_NE.sum(axis=0)).sum())


@dataclass(frozen=True, eq=False)
class WindowForecast:
    """Sum of the newest microbatches' counts, `WINDOW` at most; `kept` has them, oldest first."""

    kept: tuple[Int64, ...] = ()

    def observe(self, counts_NE: Int64) -> WindowForecast:
        """Return the state after one more microbatch, int64 [N, E], or several, [M, N, E]."""
        new_MNE = counts_NE.astype(np.int64).reshape(-1, *counts_NE.shape[-2:])
        new_MNE.setflags(write=False)
        return WindowForecast((*self.kept, *new_MNE)[-WINDOW:])

    def changed(self, change: Callable[[Int64], Int64]) -> WindowForecast:
        return WindowForecast(tuple(map(change, self.kept)))

    def counts_NE(self) -> Int64:
        if not self.kept:
            raise ValueError("nothing was observed yet; call observe first")
        sum_NE: Int64 = np.sum(self.kept, axis=0, dtype=np.int64)
        sum_NE.setflags(write=False)
        return sum_NE
