"""A `MicrobatchPlan` is the plan of one forward pass of one layer on one rank.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas
from megatron_laer.planner.token_rows import TokenRows
from megatron_laer.runtime.weights.restored import RestoredExperts


@dataclass(eq=False)
class FirstPass:
    """Results of the first pass's exchanges, for the re-run under a checkpoint."""

    token_rows: TokenRows | None = None


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Layout and quotas of one microbatch on one rank.

    Attributes:
        restored: the experts that the pass computes with, under the layout that was planned.
        quotas: which tokens this rank sends and receives.
        routing_map_TE: only in the plan of a re-run under a checkpoint, the first pass's routing.
            A router that runs again may decide a near-tie the other way, since Megatron's combine
            adds with atomics on CUDA. The counts exchanged in the first pass would not fit.
        first_pass: the same for the first pass and for the re-run.
    """

    restored: RestoredExperts
    quotas: RankQuotas
    routing_map_TE: torch.Tensor | None = None
    first_pass: FirstPass = field(default_factory=FirstPass)

    @property
    def backward_follows(self) -> bool:
        """Whether the backward pass runs right after this forward, as in a checkpoint's re-run.

        Restored weights are then kept for it.
        """
        return self.routing_map_TE is not None

    @property
    def layout(self) -> ExpertLayout:
        return self.restored.index.layout

    def for_rerun(self, routing_map_TE: torch.Tensor) -> MicrobatchPlan:
        """Return the same plan, for the re-run under a checkpoint."""
        return replace(self, routing_map_TE=routing_map_TE)
