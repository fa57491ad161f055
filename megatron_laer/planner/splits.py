"""Quotas of one microbatch, by the name of a split.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.choices import Split
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.quotas import EvenSplit, SplitTotals, even_split


class Quotas(Protocol):
    """Split of the tokens of one microbatch over the replicas of their experts."""

    @property
    def counts_NE(self) -> Int64:
        """Return the tokens on each source rank for each expert."""
        ...

    @property
    def loads_S(self) -> Int64:
        """Return the tokens that each slot computes."""
        ...

    def totals(self) -> SplitTotals:
        """Return the totals of slots and ranks."""
        ...

    def rank_row(self, rank: int) -> Int64:
        """Return the tokens that `rank` sends to each slot, int64 [S]."""
        ...

    def rank_columns(self, rank: int) -> Int64:
        """Return the tokens that each source sends to the slots of `rank`, int64 [N, C]."""
        ...


@dataclass(frozen=True, eq=False)
class RankQuotas:
    """One rank's part of a microbatch's quotas, made in one native call.

    Attributes:
        row_S: tokens that the rank sends to each slot.
        columns_NC: tokens that each rank sends to this rank's slots.
        input_splits_N, output_splits_N: tokens sent to each rank, and received from it.
        tokens_C: tokens that each of the rank's slots computes.
        runs: packed runs of rows between which tokens move; see `layer.dispatch.permutation`.
    """

    row_S: Int64
    columns_NC: Int64
    input_splits_N: list[int]
    output_splits_N: list[int]
    tokens_C: list[int]
    runs: npt.NDArray[np.int32]

    @property
    def num_sent(self) -> int:
        """Return the number of tokens that the rank sends, one per (token, expert) pair."""
        return sum(self.input_splits_N)

    @property
    def num_received(self) -> int:
        return sum(self.output_splits_N)

    @classmethod
    def of(cls, layout: ExpertLayout, row_S: Int64, columns_NC: Int64) -> RankQuotas:
        slots_S, num_experts = layout.slot_expert_S, layout.num_experts
        return cls(*native.rank_quotas(slots_S, row_S, columns_NC, num_experts))


@dataclass(frozen=True)
class EvenQuotas:
    """Even split of one microbatch."""

    split: EvenSplit
    counts_NE: Int64

    @cached_property
    def loads_S(self) -> Int64:
        """Return the tokens that each slot computes; computed only if metrics read them."""
        return self.split.slot_loads(self.counts_NE)

    def totals(self) -> SplitTotals:
        return self.split.totals(self.counts_NE)

    def rank_row(self, rank: int) -> Int64:
        return self.split.rank_row(self.counts_NE, rank)

    def rank_columns(self, rank: int) -> Int64:
        return self.split.rank_columns(self.counts_NE, rank)


def solve_quotas(split: Split, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Quotas:
    """Split the tokens of a microbatch over the replicas of their experts."""
    if split == Split.EXACT:
        return exact_split(layout, node_size).solve(counts_NE)
    return EvenQuotas(even_split(layout, node_size), counts_NE)
