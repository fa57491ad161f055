"""One microbatch of a layer on all ranks, by seed: routing, layout and quotas. Nothing is sent.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.choices import Split
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas


@dataclass(frozen=True)
class Rank:
    """Tokens and quotas of one rank."""

    layout: ExpertLayout
    map_TE: torch.Tensor
    quotas: RankQuotas
    node_size: int


def route(
    layout: ExpertLayout,
    tokens: Sequence[int],
    top_k: int,
    seed: int = 0,
    *,
    node_size: int = 1,
    split: Split = Split.EXACT,
    hot: bool = False,
    uneven: bool = False,
) -> list[Rank]:
    """Route each rank's tokens at random.

    `hot` sends all to expert 0. With `uneven` tokens have fewer experts, or none; else it is the
    third one alone, as padding.
    """
    rng = np.random.default_rng(seed)
    maps = []
    for number in tokens:
        scores_TE = rng.random((number, layout.num_experts))
        scores_TE[:, 0] += hot
        map_TE = np.zeros(scores_TE.shape, dtype=np.bool_)
        np.put_along_axis(map_TE, np.argsort(-scores_TE, axis=1)[:, :top_k], True, axis=1)
        if uneven:
            map_TE &= rng.random(map_TE.shape) > 0.7
        elif number > 3:
            map_TE[2] = False
        maps.append(map_TE)
    counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
    quotas = solve_quotas(split, counts_NE, layout, node_size)
    found = []
    for rank, map_TE in enumerate(maps):
        mine = RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
        found.append(Rank(layout, torch.from_numpy(map_TE), mine, node_size))
    return found


def exchange(
    sent: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Exchange rows within each group; `sizes` are the rows from each rank to its group."""
    received = {}
    for ranks in groups:
        parts = {rank: sent[rank].split(list(sizes[rank])) for rank in ranks}
        for place, rank in enumerate(ranks):
            received[rank] = torch.cat([parts[source][place] for source in ranks])
    return [received[rank] for rank in range(len(sent))]
