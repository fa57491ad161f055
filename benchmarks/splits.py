"""The balance of a case under a system's own splitting of tokens.

Legend: N ranks, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.rivals.eplb import split_among_all
from megatron_laer.arrays import Int64
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split


class Planner(Protocol):
    """Interface of a strategy, ours or a rival's."""

    @property
    def name(self) -> str: ...

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout: ...


@dataclass(frozen=True)
class Outcome:
    """One case: largest over mean rank load, whether it misses the bound, tokens off their node."""

    ratio: float
    violation: bool
    off_node_share: float


@dataclass(frozen=True)
class BalanceRow:
    """A row of the balance table, over all cases."""

    strategy: str
    mode: str
    lag: str
    capacity: int
    cases: int
    mean: float
    p95: float
    p99: float
    max: float
    violations: int
    off_node_share: float

    @classmethod
    def of(
        cls, strategy: str, mode: str, lag: str, capacity: int, outcomes: Sequence[Outcome]
    ) -> BalanceRow:
        ratios = np.array([outcome.ratio for outcome in outcomes])
        return cls(
            strategy,
            mode,
            lag,
            capacity,
            len(outcomes),
            float(ratios.mean()),
            float(np.percentile(ratios, 95)),
            float(np.percentile(ratios, 99)),
            float(ratios.max()),
            sum(outcome.violation for outcome in outcomes),
            float(np.mean([outcome.off_node_share for outcome in outcomes])),
        )


Split = Callable[[Int64, ExpertLayout, int], Outcome]


def split_exactly(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Outcome:
    quotas = exact_split(layout, node_size).solve(counts_NE)
    return _outcome(counts_NE, quotas.rank_loads_N(), int(quotas.totals().far_S.sum()))


def split_evenly(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Outcome:
    """Split as in the paper; for all rivals without a splitting of their own."""
    totals = even_split(layout, node_size).totals(counts_NE)
    loads_N = (totals.near_S + totals.far_S).reshape(layout.num_ranks, -1).sum(axis=1)
    return _outcome(counts_NE, loads_N, int(totals.far_S.sum()))


def split_like_eplb(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Outcome:
    """Split evenly among all replicas, regardless of the source."""
    return _outcome(counts_NE, *split_among_all(counts_NE, layout, node_size))


def _outcome(counts_NE: Int64, loads_N: Int64, off_node_tokens: int) -> Outcome:
    total = max(int(counts_NE.sum()), 1)
    largest = int(loads_N.max())
    least = -(-int(counts_NE.sum()) // loads_N.size)
    return Outcome(largest * loads_N.size / total, largest > least, off_node_tokens / total)
