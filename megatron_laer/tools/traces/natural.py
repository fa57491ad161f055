"""Made-up routing with the skew of real runs, whose loads drift slowly.

Loads are log-normal over experts, the same mixture on every rank. The busiest of 8 groups of
neighbouring experts has 1.5 times the mean. Runs with an auxiliary loss show 1.3 to 1.7. Megatron's
workloads W1 to W7 are stress tests, with 2 to 4 times the mean.

Legend: N ranks, E experts, K experts of a token, Z normal draws.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64

_GROUPS, _MAX_OVER_MEAN = 8, 1.5
# Angle by which the logarithms of the loads turn between two independent draws, per step.
_DRIFT = 0.02
# Most tokens of a rank that choose the same expert.
_MOST_TOKENS = 0.95
_WIDEST, _HALVINGS = 4.0, 40


def natural_counts(ranks: int, experts: int, topk: int, tokens: int, step: int, seed: int) -> Int64:
    """Return counts_NE, int64 [N, E], of one step; each rank has `tokens` with K experts each."""
    share_E = _shares(experts, topk, step, seed)
    rng = np.random.default_rng([seed, step])
    counts_NE = rng.multinomial(tokens * topk, share_E, size=ranks).astype(np.int64)
    # An expert gets a token once at most; the rest goes to experts with room.
    for counts_E in counts_NE:
        while (excess := int(np.maximum(counts_E - tokens, 0).sum())) > 0:
            np.minimum(counts_E, tokens, out=counts_E)
            open_E = counts_E < tokens
            counts_E += rng.multinomial(excess, open_E / open_E.sum())
    return counts_NE


@lru_cache(maxsize=64)
def _shares(experts: int, topk: int, step: int, seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    first_E, second_E = rng.standard_normal((2, experts))
    angle = _DRIFT * step
    normal_E = math.cos(angle) * first_E + math.sin(angle) * second_E
    narrow, wide = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        spread = (narrow + wide) / 2
        is_skewed = _max_over_mean(_capped(np.exp(spread * normal_E), topk)) > _MAX_OVER_MEAN
        narrow, wide = (narrow, spread) if is_skewed else (spread, wide)
    return _capped(np.exp(narrow * normal_E), topk)


def _capped(load_E: npt.NDArray[np.float64], topk: int) -> npt.NDArray[np.float64]:
    """Return shares of at most `_MOST_TOKENS` of K each, where experts suffice for that."""
    share_E = load_E / load_E.sum()
    most = max(_MOST_TOKENS / topk, 1.0 / len(share_E))
    for _ in range(len(share_E)):
        if share_E.max() <= most * (1 + 1e-9):
            break
        over_E = share_E >= most
        rest = 1.0 - most * over_E.sum()
        share_E = np.where(over_E, most, share_E * rest / share_E[~over_E].sum())
    return share_E


def _max_over_mean(share_E: npt.NDArray[np.float64]) -> float:
    sums = [part.sum() for part in np.array_split(share_E, min(_GROUPS, len(share_E)))]
    return float(max(sums) * len(sums))
