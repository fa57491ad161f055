"""A `MicrobatchPlan` is the value that one forward pass of one layer follows on one rank.

Legend: N ranks, E experts, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.runtime.weights.restored import RestoredExperts


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Holds layout and quotas of one microbatch, as one rank sees them.

    Attributes:
        restored: the experts that the pass computes with, under the layout that was planned.
        row_S: tokens that this rank sends to each slot.
        columns_NC: tokens that each rank sends to this rank's slots.
        routing_map_TE: only in the plan of a re-run under a checkpoint, the first pass's routing.
            A router that runs again may decide a near-tie the other way (Megatron's combine adds
            with atomics on CUDA), and the counts exchanged in the first pass would not fit.
    """

    restored: RestoredExperts
    row_S: Int64
    columns_NC: Int64
    routing_map_TE: torch.Tensor | None = None

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

    @property
    def input_splits_N(self) -> list[int]:
        """Count the tokens that this rank sends to each rank."""
        splits: list[int] = self.row_S.reshape(self.layout.num_ranks, -1).sum(axis=1).tolist()
        return splits

    @property
    def output_splits_N(self) -> list[int]:
        """Count the tokens that this rank receives from each rank."""
        splits: list[int] = self.columns_NC.sum(axis=1).tolist()
        return splits

    @property
    def tokens_C(self) -> list[int]:
        """Count the tokens that each of this rank's slots computes."""
        tokens: list[int] = self.columns_NC.sum(axis=0).tolist()
        return tokens

    @property
    def num_sent(self) -> int:
        """Count the tokens that this rank sends, one per (token, expert) pair."""
        return int(self.row_S.sum())

    def for_rerun(self, routing_map_TE: torch.Tensor) -> MicrobatchPlan:
        """Return the same plan, for the re-run under a checkpoint."""
        return replace(self, routing_map_TE=routing_map_TE)
