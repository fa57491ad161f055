"""Made-up routing with the statistics of LAER-MoE's published tokens per rank.

They are of Mixtral-8x7B with 8 and with 16 experts, whose routers had learned for a few steps
without auxiliary loss:

- Shares of the four quarters of experts deviate by 0.37 and 0.48 of their mean.
- Deviations of microbatches 16 apart correlate by 0.51. An iteration has two.
- A quarter's share deviates by 0.0275 and 0.0179 between nodes of 8 ranks, as if each rank's texts
  had an expert mixture of their own.

The constants below were chosen for these statistics alone, not for the balance that planning has.

Legend: N ranks, E experts, K experts of a token.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_laer.arrays import Int64

# Standard deviations of the logarithms of an expert's load: between experts, with up to 8 and with
# more of them, and of one expert between ranks.
_FEW_EXPERTS, _OF_FEW, _OF_MANY, _OF_TEXT = 8, 0.65, 1.25, 0.6
# Angle by which the logarithms turn between two independent draws, per iteration.
_DRIFT = 0.13


def paper_counts(ranks: int, experts: int, topk: int, tokens: int, step: int, seed: int) -> Int64:
    """Return counts_NE, int64 [N, E], of one step; each rank has `tokens` with K experts each."""
    first_E, second_E = np.random.default_rng(seed).standard_normal((2, experts))
    angle = _DRIFT * step
    drifted_E = math.cos(angle) * first_E + math.sin(angle) * second_E
    spread = _OF_FEW if experts <= _FEW_EXPERTS else _OF_MANY
    rng = np.random.default_rng([seed, step])
    load_NE = np.exp(spread * drifted_E + _OF_TEXT * rng.standard_normal((ranks, experts)))
    counts_NE = np.zeros((ranks, experts), dtype=np.int64)
    # An expert gets a token once at most; the rest goes to experts with room.
    for counts_E, load_E in zip(counts_NE, load_NE, strict=True):
        while (rest := tokens * topk - int(counts_E.sum())) > 0:
            open_E = np.where(counts_E < tokens, load_E, 0.0)
            counts_E += rng.multinomial(rest, open_E / open_E.sum())
            np.minimum(counts_E, tokens, out=counts_E)
    return counts_NE
