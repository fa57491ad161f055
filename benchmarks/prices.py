"""Predicted seconds of a layer under exact quotas, for the choice between two layouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.costs import CostModel, load_cluster
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.quotas import Int64


@dataclass(frozen=True)
class Prices:
    """Predicted seconds of a layer on the paper's cluster with Mixtral-8x7B's experts.

    Restoring a slot after the gate is not hidden: a rank receives the expert's slices from all
    others, once in forward and as gradients once more in backward, inside the node and from other
    nodes one after the other. A fresh layout pays for its changed slots on the busiest rank; the
    time to solve is the measured one.
    """

    costs: CostModel
    slot_s: float
    solve_s: float

    @classmethod
    def of(cls, geometry: Geometry, solve_s: float) -> Prices:
        costs = paper_costs()
        expert_bytes = 3 * 4096 * 14336 * 2
        slice_bytes = expert_bytes / geometry.num_ranks
        near_s = (geometry.node_size - 1) * slice_bytes / costs.intra_bytes_per_s
        far_ranks = geometry.num_ranks - geometry.node_size
        far_s = far_ranks * slice_bytes / costs.inter_bytes_per_s
        return cls(costs, 2 * (near_s + far_s), solve_s)

    def layer_s(self, counts_NE: Int64, layout: ExpertLayout, node_size: int) -> float:
        """Experts and tokens, forward and backward, under exact quotas; as `CostModel` has it."""
        totals = exact_split(layout, node_size).totals(counts_NE)
        near_N = totals.near_S.reshape(layout.num_ranks, -1).sum(axis=1)
        far_N = totals.far_S.reshape(layout.num_ranks, -1).sum(axis=1)
        intra_N = np.maximum(totals.sent_near_N, near_N) - totals.own_N
        inter_N = np.maximum(totals.sent_far_N, far_N)
        tokens_s = self.costs.token_bytes * (
            intra_N / self.costs.intra_bytes_per_s + inter_N / self.costs.inter_bytes_per_s
        )
        experts_s = 3 * self.costs.expert_s_per_token * int((near_N + far_N).max())
        return float(experts_s + 4 * tokens_s.max())

    def change_s(self, before: ExpertLayout, after: ExpertLayout) -> float:
        """Unhidden restores and the solve."""
        changed_S = before.slot_expert_S != after.slot_expert_S
        most = int(changed_S.reshape(before.num_ranks, -1).sum(axis=1).max())
        return most * self.slot_s + self.solve_s


def paper_costs() -> CostModel:
    """Mixtral-8x7B's experts on the paper's cluster."""
    cluster = load_cluster("a100-4x8-ib800")
    return CostModel.from_shapes(
        hidden=4096,
        ffn=14336,
        gated=True,
        bytes_per_element=2,
        flops_per_s=cluster.flops_per_s,
        intra_bytes_per_s=cluster.intra_bytes_per_s,
        inter_bytes_per_s=cluster.inter_bytes_per_s,
    )
