"""What every algorithm that restores experts and reduces their gradients offers; no algorithm.

Legend: N ranks, E experts, C slots per rank; R rows of a matrix, r rows of the slice that one rank
holds, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex


@dataclass(frozen=True)
class Kept:
    """A restored matrix that may be updated in place, and the layout it was restored under.

    Its slices must not have changed since: not across an optimizer step.
    """

    index: LayoutIndex
    matrix_CRK: torch.Tensor


@dataclass
class ExchangeCount:
    """What this rank received from others, for metrics and for tests of the documented formulas.

    Counted from the sizes that collectives are given. Restores, changes of what was restored and
    reduces are counted by their caller, since a layer restores several matrices at once.
    """

    restores: int = 0
    changes: int = 0
    reduces: int = 0
    restore_intra_bytes: int = 0
    restore_inter_bytes: int = 0
    reduce_intra_bytes: int = 0
    reduce_inter_bytes: int = 0
    restore_collectives: int = 0
    reduce_collectives: int = 0

    @property
    def restore_bytes(self) -> int:
        """Received by restores, over any link."""
        return self.restore_intra_bytes + self.restore_inter_bytes

    @property
    def reduce_bytes(self) -> int:
        """Received by reduces, over any link."""
        return self.reduce_intra_bytes + self.reduce_inter_bytes


class Exchange(Protocol):
    """Restore and reduce, collective over the FSEP group: all ranks call them in the same order.

    Restores share a communicator and a workspace, reduces another of each. So one restore and one
    reduce may be in flight at once, from two threads or two streams, but no two restores.
    """

    count: ExchangeCount

    def restore(
        self,
        slice_ErK: torch.Tensor,
        index: LayoutIndex,
        rows: int,
        *,
        kept: Kept | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Whole experts for this rank's slots.

        Args:
            slice_ErK: this rank's rows of every expert.
            index: the layout to restore.
            rows: R, rows of the whole matrix.
            kept: what was restored under another layout. Only slots whose expert differs are
                restored, into this very tensor; `node` moves only experts between nodes that the
                receiving node did not have. If no slot of any rank differs, there is no collective.
                All ranks must keep the same layout.
            out: where to restore to, contiguous [C, R, K]; a new tensor without it. Not with
                `kept`.

        Returns:
            [C, R, K], expert `slots[c]` of this rank at c; `out` or the kept tensor if given.
        """
        ...

    def reduce(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradients of this rank's slice of every expert, summed over the expert's replicas.

        Sums run in float32 and in a fixed order: the same gradients give the same bits.

        Args:
            grad_CRK: gradients of this rank's restored experts; left as they are.
            index: the layout they were restored with.
            wire_dtype: of sums that `node` sends to other nodes, unless it was made for one; the
                gradient's own without either.
            out: where to reduce to, contiguous [E, r, K]; a new tensor without it.

        Returns:
            [E, r, K] in the gradient's dtype, as autograd demands; Megatron adds microbatches in
            float32.
        """
        ...

    def prepare(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        """Build the index tensors that exchanges of this layout need; they would do it themselves.

        Args:
            before: the layout of what will be kept.
        """
        ...
