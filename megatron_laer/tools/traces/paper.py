"""Made-up routing with the statistics of LAER-MoE's published tokens per rank.

They are of Mixtral-8x7B without auxiliary loss: of 5 iterations with 8 experts, and of 15 with 16.
An iteration has two microbatches. Its published times are of iterations 21 to 70.

| | first five iterations | iterations 13 to 15 |
|---|---|---|
| deviation of the four quarters of experts from their mean | 0.38, 0.38 | –, 0.63 |
| between nodes of 8 ranks, deviation of a quarter's share | 0.0277, 0.0240 | –, 0.0106 |
| correlation of deviations 8 microbatches apart | 0.86 | 0.90 |

Nodes differ as if each rank's texts had an expert mixture of their own. With 8 experts the later
statistics are not published, and taken to have grown as with 16. The constants below were chosen
for these statistics of the layers that `simulate` draws, not for the balance that planning has, nor
for times.

Legend: N ranks, E experts, K experts of a token.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_laer.arrays import Int64

# Standard deviations of the logarithms of an expert's load, between experts and between ranks: with
# up to 8 experts and with more, in the first iterations and later.
_FEW_EXPERTS = 8
_FIRST = ((0.75, 0.64), (1.15, 0.9))
_LATER = ((1.5, 0.3), (4.0, 0.63))
# Angle by which the logarithms turn between two independent draws, per microbatch.
_DRIFT = 0.05
# Microbatches of an iteration.
PAPERS_MICROBATCHES = 2


def paper_counts(
    ranks: int, experts: int, topk: int, tokens: int, step: int, seed: int, *, first: bool = False
) -> Int64:
    """Return counts_NE, int64 [N, E], of one microbatch, the step; each rank has `tokens`."""
    first_E, second_E = np.random.default_rng(seed).standard_normal((2, experts))
    angle = _DRIFT * step
    drifted_E = math.cos(angle) * first_E + math.sin(angle) * second_E
    spread, of_text = (_FIRST if first else _LATER)[experts > _FEW_EXPERTS]
    rng = np.random.default_rng([seed, step])
    load_NE = np.exp(spread * drifted_E + of_text * rng.standard_normal((ranks, experts)))
    counts_NE = np.zeros((ranks, experts), dtype=np.int64)
    # An expert gets a token once at most; the rest goes to experts with room.
    for counts_E, load_E in zip(counts_NE, load_NE, strict=True):
        while (rest := tokens * topk - int(counts_E.sum())) > 0:
            open_E = np.where(counts_E < tokens, load_E, 0.0)
            counts_E += rng.multinomial(rest, open_E / open_E.sum())
            np.minimum(counts_E, tokens, out=counts_E)
    return counts_NE
