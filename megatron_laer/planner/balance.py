"""Tokens per rank and their balance, under FSEP and under stock placement.

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import stock_owner_E
from megatron_laer.planner.splits import Quotas


def max_over_mean(tokens_N: Int64) -> float:
    """Return the largest number over the mean; 1 if there is no token."""
    total = int(tokens_N.sum())
    return int(tokens_N.max()) * tokens_N.size / total if total else 1.0


def fsep_tokens_N(quotas: Quotas) -> Int64:
    """Return the tokens that each rank computes."""
    tokens_N: Int64 = quotas.loads_S.reshape(len(quotas.counts_NE), -1).sum(axis=1)
    return tokens_N


def stock_tokens_N(counts_NE: Int64) -> Int64:
    """Return the tokens that each rank would compute under stock Megatron's placement."""
    num_ranks, num_experts = counts_NE.shape
    owner_E = stock_owner_E(num_ranks, num_experts)
    loads_E = counts_NE.sum(axis=0)
    return np.bincount(owner_E, weights=loads_E, minlength=num_ranks).astype(np.int64)
