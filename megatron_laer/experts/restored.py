"""Whole experts of one layer for one microbatch, alive only while something computes with them.

Restored weights are not saved by autograd. A forward pass drops them when it is done, and the
backward pass restores them again just before the experts' backward; only a pass whose backward
follows at once (the re-run under a checkpoint) keeps them.

Legend: E experts, C slots per rank, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_laer.experts.slices import SliceSpec
from megatron_laer.runtime.layout_index import LayoutIndex
from megatron_laer.runtime.restore import FlatExchange


class RestoredExperts:
    """The slots' matrices `[C, R, K]` of one layer, and how to get them back.

    The slices are read each time: they do not change between a microbatch's forward and backward.
    """

    def __init__(
        self,
        slices: Sequence[torch.Tensor],
        specs: Sequence[SliceSpec],
        index: LayoutIndex,
        exchange: FlatExchange,
    ) -> None:
        self._slices = [slice_ErK.detach() for slice_ErK in slices]
        self._specs = tuple(specs)
        self.index = index
        self.exchange = exchange
        self._matrices: tuple[torch.Tensor, ...] | None = None

    def restore(self) -> tuple[torch.Tensor, ...]:
        """Fetch the slots' experts, unless they are here. Collective over the FSEP group."""
        if self._matrices is None:
            self._matrices = tuple(
                self.exchange.restore(slice_ErK, self.index, spec.rows)
                for slice_ErK, spec in zip(self._slices, self._specs, strict=True)
            )
            self.exchange.count.restores += 1
        return self._matrices

    def matrix(self, position: int) -> torch.Tensor:
        """The `position`-th matrix of every slot; it must have been restored."""
        assert self._matrices is not None, "experts read before they were restored"
        return self._matrices[position]

    def release(self) -> None:
        """Let go of the restored matrices."""
        self._matrices = None


class _Restore(torch.autograd.Function):
    """Forward: slices out, whole experts in. Backward: whole gradients out, slices' in."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, restored: RestoredExperts, *slices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.index, ctx.exchange = restored.index, restored.exchange
        # Aliases, since an output must not be the very tensor that `restored` keeps.
        return tuple(matrix.view_as(matrix) for matrix in restored.restore())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        reduced = [ctx.exchange.reduce(grad_CRK, ctx.index) for grad_CRK in grads]
        ctx.exchange.count.reduces += 1
        return (None, *reduced)


class _RestoreBeforeBackward(torch.autograd.Function):
    """Identity on the experts' output, whose backward restores what the experts' backward reads.

    An autograd node rather than a hook on the saved weights: it runs exactly once per backward, at
    the same place on every rank, also on a rank that received no token.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, restored: RestoredExperts) -> torch.Tensor:  # type: ignore[override]
        ctx.restored = restored
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.restored.restore()
        return grad, None


def restore(restored: RestoredExperts, slices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Restore differentiably; the results are for the expert compute alone, not to be kept."""
    matrices: tuple[torch.Tensor, ...] = _Restore.apply(restored, *slices)
    return matrices


def restore_before_backward(output: torch.Tensor, restored: RestoredExperts) -> torch.Tensor:
    """Mark the experts' output, so that backward restores before it enters the experts."""
    marked: torch.Tensor = _RestoreBeforeBackward.apply(output, restored)
    return marked
