"""One microbatch of a layer on all ranks: its routing, layout and quotas, by seed.

`token_traffic.py` counts its rows. Nothing is sent.

Legend: N ranks, E experts, C slots per rank, S slots, T tokens of a rank, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from benchmarks.token_traffic import TokenRouting
from megatron_laer.arrays import Bool
from megatron_laer.choices import Split
from megatron_laer.layer.dispatch import replica_choice
from megatron_laer.layer.dispatch.replica_choice import choose_replicas, token_order
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas


@dataclass(frozen=True)
class Shape:
    nodes: int
    node_size: int
    experts: int
    topk: int
    tokens: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.node_size


TOP_8_OF_128 = Shape(nodes=4, node_size=8, experts=128, topk=8, tokens=4096)


@dataclass(frozen=True, eq=False)
class Case:
    """One microbatch of a layer, on all ranks."""

    maps: Sequence[Bool]
    shape: Shape
    layout: ExpertLayout
    max_over_mean: float
    quotas: Sequence[RankQuotas]

    @classmethod
    def of(
        cls,
        maps: Sequence[Bool],
        shape: Shape,
        layout: ExpertLayout,
        split: Split,
        top_k: int = 0,
    ) -> Case:
        """Split tokens over a layout; see `Geometry.top_k`."""
        counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
        quotas = solve_quotas(split, counts_NE, layout, shape.node_size, top_k)
        mine = [
            RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
            for rank in range(shape.ranks)
        ]
        return cls(maps, shape, layout, max_over_mean(fsep_tokens_N(quotas)), mine)

    def count(self, *, chooses: bool) -> TokenRouting:
        """Count rows with the choice of replicas, or in token order."""
        slots = [self.slots(rank, chooses=chooses).numpy() for rank in range(self.shape.ranks)]
        return TokenRouting.count(self.maps, slots, self.layout.capacity, self.shape.node_size)

    def slots(self, rank: int, *, chooses: bool) -> torch.Tensor:
        map_TE, quotas = torch.from_numpy(self.maps[rank]), self.quotas[rank]
        if chooses:
            with mock.patch.object(replica_choice, "_LEAST_SHARE", 0.0):  # also for a small gain
                return choose_replicas(map_TE, quotas, self.shape.node_size, rank)
        return token_order(map_TE, quotas, self.shape.node_size)


def routing_maps(shape: Shape, skew: float, seed: int) -> list[Bool]:
    """Draw each token's K experts without replacement, by popularity with this log-deviation."""
    rng = np.random.default_rng(seed)
    log_E = skew * rng.normal(size=shape.experts)
    maps = []
    for _ in range(shape.ranks):
        noisy_TE = log_E + rng.gumbel(size=(shape.tokens, shape.experts))
        map_TE = np.zeros(noisy_TE.shape, dtype=np.bool_)
        chosen_TK = np.argpartition(-noisy_TE, shape.topk - 1, axis=1)[:, : shape.topk]
        np.put_along_axis(map_TE, chosen_TK, True, axis=1)
        maps.append(map_TE)
    return maps
