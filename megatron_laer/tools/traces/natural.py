"""Made-up routing with the skew of real runs, whose loads drift slowly.

The busiest of 8 groups of neighbouring experts has 1.5 times the mean, as in runs with an auxiliary
loss, which show 1.3 to 1.7. With twice as many groups the factor is 1.12 times as large. It grows
so in FLAME-MoE on its training text: 1.11, 1.19, 1.32 and 1.53 of 8, 16, 32 and 64 groups. In
Qwen1.5-MoE it is 1.10, 1.20 and 1.48 of 10, 20 and 60. Skew is larger without the loss, or on text
of another kind than in training. Megatron's workloads W1 to W7 are stress tests.

Legend: N ranks, E experts, K experts of a token, Q groups, P groups of the level before.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64

_GROUPS, _MAX_OVER_MEAN, _GROWTH = 8, 1.5, 1.12
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
    """Return the experts' shares, by levels of groups down to single experts.

    A level splits the load of each group before among its parts, log-normally.
    """
    share_Q = _split(np.ones(1), min(_GROUPS, experts), step, seed)
    while (groups := 2 * len(share_Q)) < experts and experts % groups == 0:
        share_Q = _split(share_Q, groups, step, seed)
    if len(share_Q) < experts:
        share_Q = _split(share_Q, experts, step, seed)
    return _capped(share_Q, topk)


def _split(
    share_P: npt.NDArray[np.float64], groups: int, step: int, seed: int
) -> npt.NDArray[np.float64]:
    """Split shares into about as many parts each, so that the largest of all is as expected."""
    rng = np.random.default_rng([seed, groups])
    first_Q, second_Q = rng.standard_normal((2, groups))
    angle = _DRIFT * step
    normal_Q = math.cos(angle) * first_Q + math.sin(angle) * second_Q
    parts = np.array_split(np.arange(groups), len(share_P))
    whole_Q = np.repeat(np.arange(len(share_P)), [len(part) for part in parts])

    def split(spread: float) -> npt.NDArray[np.float64]:
        part_Q: npt.NDArray[np.float64] = np.exp(spread * normal_Q)
        part_Q *= (share_P / np.bincount(whole_Q, weights=part_Q))[whole_Q]
        return part_Q

    largest = _MAX_OVER_MEAN * _GROWTH ** math.log2(groups / _GROUPS) / groups
    narrow, wide = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        spread = (narrow + wide) / 2
        narrow, wide = (narrow, spread) if split(spread).max() > largest else (spread, wide)
    return split(narrow)


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
