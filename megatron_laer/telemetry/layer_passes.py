"""`LayerPasses` adds up one layer's passes of one step: their balance, and what was decided.

Its values have the names of recordings (see `metrics`), of which a report on a trace alone works
out the same. Nothing here measures time.

Legend: N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.planner.guard import Decision
from megatron_laer.planner.prediction import Prediction


@dataclass
class LayerPasses:
    """Collects what a step's passes of one layer were.

    Attributes:
        rank_tokens_N: that each rank computed.
        number: of the passes.
        fresh: passes that got a layout of their own.
        changed_slots: that were fetched after the gate.
        largest_tokens, least_tokens: of the busiest rank, in the pass with the most, and with
            perfect balance in that pass.
        ratios, stock_ratios: of each pass, tokens of the busiest rank over the mean, as decided
            and under stock's placement.
        gains_s, costs_s: of the passes that weighed a fresh layout.
    """

    rank_tokens_N: Int64
    number: int = 0
    fresh: int = 0
    changed_slots: int = 0
    largest_tokens: int = 0
    least_tokens: int = 0
    ratios: list[float] = field(default_factory=list)
    stock_ratios: list[float] = field(default_factory=list)
    gains_s: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)

    @classmethod
    def none_of(cls, num_ranks: int) -> LayerPasses:
        """Begin without a pass."""
        return cls(np.zeros(num_ranks, dtype=np.int64))

    def add(self, decision: Decision) -> None:
        """Add a pass."""
        tokens_N = fsep_tokens_N(decision.quotas)
        self.rank_tokens_N += tokens_N
        self.number += 1
        largest = int(tokens_N.max())
        if largest >= self.largest_tokens:
            self.largest_tokens = largest
            self.least_tokens = -(-int(tokens_N.sum()) // tokens_N.size)
        self.ratios.append(max_over_mean(tokens_N))
        self.stock_ratios.append(max_over_mean(stock_tokens_N(decision.quotas.counts_NE)))
        if decision.gain_s is not None and decision.cost_s is not None:
            self.gains_s.append(decision.gain_s)
            self.costs_s.append(decision.cost_s)
        if decision.replanned:
            self.fresh += 1
            self.changed_slots += decision.changed_slots

    def values(self) -> dict[str, float]:
        """Return what is recorded of these passes, by name."""
        return {
            "passes": self.number,
            "fresh": self.fresh,
            "changed_slots": self.changed_slots,
            "largest_tokens": self.largest_tokens,
            "least_tokens": self.least_tokens,
            "max_over_mean": mean(self.ratios),
            "stock_max_over_mean": mean(self.stock_ratios),
            "gain_ms": mean(self.gains_s) * 1e3,
            "cost_ms": mean(self.costs_s) * 1e3,
        }


def predicted_values(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the means of what was predicted of some passes, by the names of recordings."""
    return {
        "predicted_ms": mean([of.layer_s for of in predictions]) * 1e3,
        "stock_ms": mean([of.stock_s for of in predictions]) * 1e3,
        "balanced_ms": mean([of.balanced_s for of in predictions]) * 1e3,
        "bound_ms": mean([of.bound_s for of in predictions]) * 1e3,
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
