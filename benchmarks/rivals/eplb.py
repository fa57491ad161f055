"""DeepSeek's EPLB in its global form, from the description in its README.

Redundant slots go, one after the other, to the expert with most load per replica. Replicas are then
packed in descending order of load, each onto the least loaded rank with room. All replicas share
tokens evenly, regardless of the source. The hierarchical form is omitted: it needs expert groups
that nodes divide, and balances worse on skewed loads.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout


@dataclass(frozen=True)
class Eplb:
    """Replication by load and balanced packing, without regard to nodes or the previous layout."""

    geometry: Geometry
    name: str = "eplb"

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        shape = self.geometry
        loads = counts_NE.sum(axis=0).tolist()
        replicas = [1] * shape.num_experts
        hottest = [(-float(load), expert) for expert, load in enumerate(loads)]
        heapq.heapify(hottest)
        for _ in range(shape.num_slots - shape.num_experts):
            _, expert = hottest[0]
            replicas[expert] += 1
            heapq.heapreplace(hottest, (-loads[expert] / replicas[expert], expert))

        weight = [loads[expert] / replicas[expert] for expert in range(shape.num_experts)]
        held: list[list[int]] = [[] for _ in range(shape.num_ranks)]
        ranks = [(0.0, rank) for rank in range(shape.num_ranks)]
        for expert in sorted(range(shape.num_experts), key=lambda e: -weight[e]):
            for _ in range(replicas[expert]):
                load, rank = heapq.heappop(ranks)
                held[rank].append(expert)
                if len(held[rank]) < shape.capacity:
                    heapq.heappush(ranks, (load + weight[expert], rank))
        slots = [expert for experts in held for expert in experts]
        return ExpertLayout.from_slots(shape.num_ranks, shape.capacity, shape.num_experts, slots)


def split_among_all(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> tuple[Int64, int]:
    """Return all ranks' loads, int64 [N], and tokens off their node, if all replicas share evenly.

    Each source deals its tokens for an expert to the replicas in turn, so totals differ by at most
    one token per source.
    """
    replicas_E = layout.replicas_E
    expert_S = layout.slot_expert_S
    share_S = counts_NE.sum(axis=0)[expert_S] // replicas_E[expert_S]
    left_E = counts_NE.sum(axis=0) % replicas_E
    order_S = np.argsort(expert_S, kind="stable")
    place_S = np.empty(layout.num_slots, dtype=np.int64)
    starts_E = np.cumsum(replicas_E) - replicas_E
    place_S[order_S] = np.arange(layout.num_slots) - starts_E[expert_S[order_S]]
    loads_S = share_S + (place_S < left_E[expert_S])

    node_S = np.arange(layout.num_slots) // (layout.capacity * node_size)
    node_counts_QE = counts_NE.reshape(-1, node_size, layout.num_experts).sum(axis=1)
    total_E = np.maximum(counts_NE.sum(axis=0), 1)
    near_S = loads_S * node_counts_QE[node_S, expert_S] / total_E[expert_S]
    loads_N = loads_S.reshape(layout.num_ranks, layout.capacity).sum(axis=1)
    return loads_N, int(counts_NE.sum() - round(float(near_S.sum())))
