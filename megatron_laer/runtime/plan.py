"""What one rank must know of one microbatch of one layer: the value that a forward pass follows.

Legend: N ranks, E experts, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_laer.layout import ExpertLayout
from megatron_laer.runtime.layout_index import LayoutIndex

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Layout and quotas of one microbatch, as one rank sees them.

    Attributes:
        index: the layout, with its index tensors on the device.
        row_S: tokens that this rank sends to each slot.
        columns_NC: tokens that each rank sends to this rank's slots.
        backward_follows: the backward pass runs right after this forward (the re-run under a
            checkpoint), so restored weights are kept for it.
    """

    index: LayoutIndex
    row_S: Int64
    columns_NC: Int64
    backward_follows: bool = False

    @property
    def layout(self) -> ExpertLayout:
        """The layout."""
        return self.index.layout

    @property
    def input_splits_N(self) -> list[int]:
        """Tokens that this rank sends to each rank."""
        splits: list[int] = self.row_S.reshape(self.layout.num_ranks, -1).sum(axis=1).tolist()
        return splits

    @property
    def output_splits_N(self) -> list[int]:
        """Tokens that this rank receives from each rank."""
        splits: list[int] = self.columns_NC.sum(axis=1).tolist()
        return splits

    @property
    def tokens_C(self) -> list[int]:
        """Tokens that each of this rank's slots computes."""
        tokens: list[int] = self.columns_NC.sum(axis=0).tolist()
        return tokens

    @property
    def num_sent(self) -> int:
        """Tokens that this rank sends, one per (token, expert) pair."""
        return int(self.row_S.sum())

    def for_rerun(self) -> MicrobatchPlan:
        """The same plan, for the re-run under a checkpoint."""
        return replace(self, backward_follows=True)
