"""The planner of LAER-MoE as its authors released it, with one scheme of replicas for ablations.

Source: "LAER-MoE: Load-Adaptive Expert Re-layout for Efficient MoE Training", arXiv 2602.11686, and
answers of its released code. Replica counts come from two schemes: `proportional_replicas` and
`even_replicas`. `place` makes a layout of each, and the objective chooses one. The layout in force
does not matter. docs/paper.md compares it with FSEP's default.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.choices import Recompute, Sharding
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split

# Passes of tokens and of experts in a step, of which a re-run of forward is one more.
_TOKEN_PASSES, _EXPERT_PASSES = 4, 3
# Tokens of a GEMM at full speed.
_MANY_TOKENS = 4096


@dataclass(frozen=True)
class Objective:
    """The paper's objective: 4 ΣT_comm + (3 + r) max T_comp, in seconds.

    T_comm is summed over ranks, T_comp is the busiest rank's. Splits are even.

    Attributes:
        expert_s: time of one (token, expert) pair in an expert's forward.
        near_s, far_s: time to send a pair's hidden state inside a node, and between nodes.
        recomputes: whether backward computes the experts again, which makes r one.
    """

    expert_s: float
    near_s: float
    far_s: float
    recomputes: bool

    @classmethod
    def of(cls, costs: CostModel) -> Objective:
        cluster = costs.cluster
        many_s = float(costs.gemm.unit_seconds(np.array([_MANY_TOKENS]))[0])
        return cls(
            many_s * costs.flops_per_token,
            costs.token_bytes / cluster.intra.bytes_per_s,
            costs.token_bytes / cluster.inter.bytes_per_s,
            costs.recompute != Recompute.NONE,
        )

    def seconds(self, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> float:
        totals = even_split(layout, node_size).totals(counts_NE)
        near = int(totals.sent_near_N.sum() - totals.own_N.sum())
        comm_s = near * self.near_s + int(totals.sent_far_N.sum()) * self.far_s
        loads_N = (totals.near_S + totals.far_S).reshape(layout.num_ranks, -1).sum(axis=1)
        comp_s = int(loads_N.max()) * self.expert_s
        return _TOKEN_PASSES * comm_s + (_EXPERT_PASSES + self.recomputes) * comp_s


Scheme = Callable[[Int64, Geometry], Int64 | None]


def even_replicas(loads_E: Int64, geometry: Geometry) -> Int64 | None:
    """Return equal replicas, int64 [E] with sum S; None where E does not divide the slots."""
    each, spare = divmod(geometry.num_slots, geometry.num_experts)
    return None if spare else np.full(geometry.num_experts, each, dtype=np.int64)


def proportional_replicas(loads_E: Int64, geometry: Geometry) -> Int64:
    """Return replicas, int64 [E] with sum S: more, repeatedly, for the hottest per replica.

    Where the slots suffice for each expert on each node, counts are multiples of the nodes Q.
    Elsewhere an expert has one more until it has Q, and then Q more. Ties go to the highest index.
    """
    nodes, slots = geometry.num_nodes, geometry.num_slots
    first = nodes if nodes * geometry.num_experts <= slots else 1
    replicas_E = np.full(geometry.num_experts, first, dtype=np.int64)
    left = slots - first * geometry.num_experts
    hottest = [(-float(load) / first, -expert) for expert, load in enumerate(loads_E)]
    heapq.heapify(hottest)
    # The queue cannot run dry: with Q replicas of each expert, no slot is left.
    while left:
        expert = -heapq.heappop(hottest)[1]
        more = nodes if replicas_E[expert] >= nodes else 1
        if more > left:
            continue
        replicas_E[expert] += more
        left -= more
        heapq.heappush(hottest, (-float(loads_E[expert]) / int(replicas_E[expert]), -expert))
    return replicas_E


@dataclass(frozen=True)
class LaerStrategy:
    """Strategy that takes the best of layouts with different replica counts; deterministic.

    Attributes:
        schemes: schemes of replica counts; the first wins ties. The proportional one replaces a
            single one without counts.
    """

    geometry: Geometry
    costs: CostModel
    name: str = "laer"
    schemes: tuple[Scheme, ...] = (even_replicas, proportional_replicas)

    def __post_init__(self) -> None:
        if self.geometry.sharding == Sharding.EXPERTS:
            raise ValueError(
                f"planner {self.name!r} lays experts out freely, but --fsep-sharding experts keeps "
                "them at home; use greedy or static, or --fsep-sharding rows"
            )

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        geometry = self.geometry
        geometry.check_counts(counts_NE.shape)
        geometry.check_layout(current)
        loads_E = counts_NE.sum(axis=0)

        def seconds(layout: ExpertLayout) -> float:
            return self.objective.seconds(counts_NE, layout, geometry.node_size)

        made = [scheme(loads_E, geometry) for scheme in self.schemes]
        found = [replicas_E for replicas_E in made if replicas_E is not None]
        found = found or [proportional_replicas(loads_E, geometry)]
        # The first of equals.
        return min((place(loads_E, each_E, geometry) for each_E in found), key=seconds)

    @cached_property
    def objective(self) -> Objective:
        return Objective.of(self.costs)


def place(loads_E: Int64, replicas_E: Int64, geometry: Geometry) -> ExpertLayout:
    """Place every replica in a slot, heaviest replicas first. O(S*N).

    Each goes to a node with the fewest replicas of its expert, there to the least loaded rank with
    a free slot. If there is none, it goes to the least loaded rank anywhere. Ties go to the lowest
    rank. A rank may hold an expert twice.
    """
    node_N = np.arange(geometry.num_ranks) // geometry.node_size
    expert_S = np.repeat(np.arange(geometry.num_experts), replicas_E)
    weight_S = (loads_E / replicas_E)[expert_S]
    free_N = np.full(geometry.num_ranks, geometry.capacity, dtype=np.int64)
    rank_load_N = np.zeros(geometry.num_ranks)
    node_replicas_EQ = np.zeros((geometry.num_experts, geometry.num_nodes), dtype=np.int64)
    held: list[list[int]] = [[] for _ in range(geometry.num_ranks)]
    for slot in heaviest_first(weight_S):
        expert = int(expert_S[slot])
        replicas_Q = node_replicas_EQ[expert]
        open_N = free_N > 0
        fewest_N = open_N & (replicas_Q == replicas_Q.min())[node_N]
        rank = int(np.argmin(np.where(fewest_N if fewest_N.any() else open_N, rank_load_N, np.inf)))
        held[rank].append(expert)
        free_N[rank] -= 1
        rank_load_N[rank] += weight_S[slot]
        replicas_Q[node_N[rank]] += 1
    slots = [expert for experts in held for expert in sorted(experts)]
    return ExpertLayout.from_slots(*geometry.shape, slots)


def heaviest_first(weight_S: npt.NDArray[np.float64]) -> Sequence[int]:
    """Return the order of replicas by weight; equal ones stay in order of experts.

    Theirs leaves that to `std::sort`, which is not stable.
    """
    order_S: list[int] = np.argsort(-weight_S, kind="stable").tolist()
    return order_S
