"""A `MicrobatchPlan` is the value that one forward pass of one layer follows on one rank.

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
    """Holds what ranks tell each other once in a microbatch, for the re-run under a checkpoint.

    Attributes:
        token_rows: the sizes of a token exchange through nodes, from the pass that exchanged them.
    """

    token_rows: TokenRows | None = None


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Holds layout and quotas of one microbatch, as one rank sees them.

    Attributes:
        restored: the experts that the pass computes with, under the layout that was planned.
        quotas: which tokens this rank sends and receives.
        routing_map_TE: only in the plan of a re-run under a checkpoint, the first pass's routing.
            A router that runs again may decide a near-tie the other way (Megatron's combine adds
            with atomics on CUDA), and the counts exchanged in the first pass would not fit.
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
        """Return the layout that was planned."""
        return self.restored.index.layout

    def for_rerun(self, routing_map_TE: torch.Tensor) -> MicrobatchPlan:
        """Return the same plan, for the re-run under a checkpoint."""
        return replace(self, routing_map_TE=routing_map_TE)

    def rows_sent(self, rank: int, node_size: int) -> tuple[int, int]:
        """Return the rows that a rank sends inside its node and to other nodes in one dispatch.

        Rows that it passes on are among them; what stays on the rank is not. Of a token exchange
        through nodes, the sizes must be known.
        """
        node, local_rank = divmod(rank, node_size)
        rows = self.first_pass.token_rows
        if rows is not None and rows.has_two_stages:
            first_M, second_G = rows.first_sent, rows.second_sent
            return sum(second_G) - second_G[local_rank], sum(first_M) - first_M[node]
        sent_N = self.quotas.input_splits_N if rows is None else rows.first_sent
        in_node = sum(sent_N[node * node_size : (node + 1) * node_size])
        return in_node - sent_N[rank], sum(sent_N) - in_node
