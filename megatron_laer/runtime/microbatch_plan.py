"""Plan of one forward pass of one layer on one rank.

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
    """Results of the first pass's exchanges and upload, for the re-run under a checkpoint."""

    token_rows: TokenRows | None = None
    runs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Layout and quotas of one microbatch on one rank.

    `restored` are the pass's experts, under the planned layout. `quotas` are tokens that this rank
    sends and receives, of `rows` of the group. `routing_map_TE`, only in a re-run's plan, is the
    first pass's routing. A router that runs again may decide a near-tie differently, since
    Megatron's combine adds with atomics on CUDA. `first_pass` is shared by the first pass and the
    re-run.
    """

    restored: RestoredExperts
    quotas: RankQuotas
    rows: int
    routing_map_TE: torch.Tensor | None = None
    first_pass: FirstPass = field(default_factory=FirstPass)

    @property
    def backward_follows(self) -> bool:
        """Return True in a checkpoint's re-run, which keeps restored weights for its backward."""
        return self.routing_map_TE is not None

    @property
    def layout(self) -> ExpertLayout:
        return self.restored.index.placed.layout

    def for_rerun(self, routing_map_TE: torch.Tensor) -> MicrobatchPlan:
        return replace(self, routing_map_TE=routing_map_TE)
