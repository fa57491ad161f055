"""The paper's planner: replica counts in two ways, greedy placement, and a choice by cost.

Source: "LAER-MoE: Load-Adaptive Expert Re-layout for Efficient MoE Training", arXiv 2602.11686.
Differences from its released code:

- any N, C, E and node size; replica counts are not rounded to multiples of the number of nodes;
- no rank takes an expert twice while another has a free slot for it;
- the even candidate also exists where E does not divide the slots;
- the current and the static layout compete too.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.config import Split
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed


@dataclass(frozen=True)
class LaerStrategy:
    """Strategy that takes the fastest of layouts with different replica counts; deterministic.

    The current and the static layout are candidates, so the choice is never predicted slower. The
    current one wins ties: a layout that cannot be improved does not change.
    """

    geometry: Geometry
    costs: CostModel
    name: str = "laer"

    def __post_init__(self) -> None:
        if self.geometry.sharding == Sharding.EXPERTS:
            raise ValueError(
                "planner 'laer' lays experts out freely, but --fsep-sharding experts keeps them at "
                "home; use greedy or static, or --fsep-sharding rows"
            )

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        geometry = self.geometry
        geometry.check_counts(counts_NE.shape)
        geometry.check_layout(current)
        loads_E = counts_NE.sum(axis=0)
        static = ExpertLayout.static(*geometry.shape)
        candidates = (
            current,
            static,
            place(loads_E, replicas_by_load(loads_E, geometry), geometry),
            place(loads_E, replicas_even(loads_E, geometry), geometry),
        )
        # min keeps the first of equals.
        return min(
            candidates,
            key=lambda layout: self.costs.layer_seconds(
                counts_NE, Placed(layout, geometry), Split.EVEN
            ),
        )


def replicas_by_load(loads_E: Int64, geometry: Geometry) -> Int64:
    """Return replicas, int64 [E] with sum S: one more, repeatedly, for the hottest per replica.

    Every expert has 1 to N, as a second copy on one rank balances nothing. Ties: fewest replicas
    first, then the lowest index.
    """
    replicas_E = np.ones(geometry.num_experts, dtype=np.int64)
    hottest = [(-float(load), 1, expert) for expert, load in enumerate(loads_E)]
    heapq.heapify(hottest)
    # The queue cannot run dry: N copies of every expert are N*E >= N*C slots.
    for _ in range(geometry.num_slots - geometry.num_experts):
        _, count, expert = heapq.heappop(hottest)
        count += 1
        replicas_E[expert] = count
        if count < geometry.num_ranks:
            heapq.heappush(hottest, (-float(loads_E[expert]) / count, count, expert))
    return replicas_E


def replicas_even(loads_E: Int64, geometry: Geometry) -> Int64:
    """Return equal replicas, int64 [E] with sum S; the hottest experts share the remainder."""
    each, spare = divmod(geometry.num_slots, geometry.num_experts)
    replicas_E = np.full(geometry.num_experts, each, dtype=np.int64)
    replicas_E[np.argsort(-loads_E, kind="stable")[:spare]] += 1
    return replicas_E


def place(loads_E: Int64, replicas_E: Int64, geometry: Geometry) -> ExpertLayout:
    """Place every replica in a slot, heaviest replicas first. O(S*N).

    Each goes to a rank with a free slot and without this expert. Among those it goes to a node with
    the fewest replicas of it, there to the least loaded rank; ties to the lowest rank. A rank holds
    an expert twice only where every free slot is on a rank that has it.
    """
    load_per_replica_E = loads_E / replicas_E
    node_N = np.arange(geometry.num_ranks) // geometry.node_size
    free_N = np.full(geometry.num_ranks, geometry.capacity, dtype=np.int64)
    rank_load_N = np.zeros(geometry.num_ranks)
    held: list[list[int]] = [[] for _ in range(geometry.num_ranks)]

    # All replicas of an expert weigh the same, so they are neighbours in the order by weight.
    for expert in np.argsort(-load_per_replica_E, kind="stable").tolist():
        without_N = np.ones(geometry.num_ranks, dtype=np.bool_)
        node_replicas_Q = np.zeros(geometry.num_nodes, dtype=np.int64)
        for _ in range(int(replicas_E[expert])):
            open_N = free_N > 0
            if (open_N & without_N).any():
                open_N &= without_N
            crowding_N = node_replicas_Q[node_N]
            open_N &= crowding_N == crowding_N[open_N].min()
            rank = int(np.argmin(np.where(open_N, rank_load_N, np.inf)))
            held[rank].append(expert)
            free_N[rank] -= 1
            rank_load_N[rank] += load_per_replica_E[expert]
            without_N[rank] = False
            node_replicas_Q[rank // geometry.node_size] += 1

    slots = [expert for experts in held for expert in sorted(experts)]
    return ExpertLayout.from_slots(*geometry.shape, slots)
