"""Map of rows to copies: it spreads rows to positions, and collects sums of copies.

Spreading and collecting are each other's gradients. No collective is run.

Legend: Y rows, X copies of them, H hidden.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laer.device import kernels_of


@dataclass(frozen=True, eq=False)
class RowMap:
    """Copies of rows.

    Attributes:
        row_X: each copy's row, int32.
        num_rows: Y.
        ends_Y: end of each row's copies in `by_row_X`; None where torch sums them.
        by_row_X: copies by row, in stable order; None where torch sums them.
    """

    row_X: torch.Tensor
    num_rows: int
    ends_Y: torch.Tensor | None = None
    by_row_X: torch.Tensor | None = None

    def spread(self, rows_YH: torch.Tensor) -> torch.Tensor:
        """Return each copy's row, [X, H]."""
        copies_XH: torch.Tensor = _Spread.apply(rows_YH, self.num_rows, *self._tensors)
        return copies_XH

    def collect(self, copies_XH: torch.Tensor) -> torch.Tensor:
        """Sum each row's copies in order, [Y, H], at least in fp32; without copies, zero."""
        rows_YH: torch.Tensor = _Collect.apply(copies_XH, self.num_rows, *self._tensors)
        return rows_YH

    def free_until_backward(
        self, copies_XH: torch.Tensor, rows_YH: torch.Tensor, output_XH: torch.Tensor
    ) -> None:
        """Free the copies until the backward pass of experts that computed `output_XH` of them.

        Until then their rows are kept. Nothing else may read the copies.
        """
        if not output_XH.requires_grad:
            return
        # Not `saved_tensors_hooks`: autograd gives parameters that passed them back as other
        # tensors, on which Megatron's fused kernels leave the mark of an added gradient in vain.
        storage = copies_XH.untyped_storage()
        kept = [(weakref.ref(storage), storage.nbytes(), rows_YH.detach())]
        storage.resize_(0)

        def refill(_grad_XH: torch.Tensor) -> None:
            if kept:  # else a second backward pass of a retained graph
                freed, num_bytes, rows_YH = kept.pop()  # since the graph may outlive the pass
                if (storage := freed()) is not None:  # an expert has saved it
                    _refill(storage, num_bytes, rows_YH, self.row_X)

        output_XH.register_hook(refill)

    @property
    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.row_X, self.ends_Y, self.by_row_X


def row_map(row_X: torch.Tensor, num_rows: int) -> RowMap:
    if dispatch_kernels(row_X) is None:
        return RowMap(row_X, num_rows)
    by_row_X = torch.sort(row_X, stable=True).indices.int()
    counts_Y = torch.zeros(num_rows, dtype=torch.int32, device=row_X.device)
    counts_Y.scatter_add_(0, row_X.long(), torch.ones_like(row_X))
    return RowMap(row_X, num_rows, counts_Y.cumsum(0, dtype=torch.int32), by_row_X)


def _refill(
    storage: torch.UntypedStorage, num_bytes: int, rows_YH: torch.Tensor, row_X: torch.Tensor
) -> None:
    storage.resize_(num_bytes)
    storage.copy_(rows_YH.index_select(0, row_X).untyped_storage())


def dispatch_kernels(tensor: torch.Tensor) -> Any:
    return kernels_of("megatron_laer.layer.dispatch", tensor.device)


def sum_copies(
    copies_XH: torch.Tensor,
    num_rows: int,
    row_X: torch.Tensor,
    ends_Y: torch.Tensor | None = None,
    by_row_X: torch.Tensor | None = None,
) -> torch.Tensor:
    if ends_Y is not None:
        summed: torch.Tensor = dispatch_kernels(copies_XH).sum_rows(copies_XH, ends_Y, by_row_X)
        return summed
    dtype = torch.promote_types(copies_XH.dtype, torch.float32)
    sums_YH = torch.zeros(
        num_rows, copies_XH.shape[1], dtype=dtype, device=copies_XH.device
    ).index_add_(0, row_X, copies_XH.to(dtype))
    return sums_YH.to(copies_XH.dtype)


class _Spread(torch.autograd.Function):
    """Each copy's row; a row's gradient is the sum of its copies'."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_YH: torch.Tensor,
        num_rows: int,
        row_X: torch.Tensor,
        *by_row: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(row_X, *by_row)
        ctx.num_rows = num_rows
        return rows_YH.index_select(0, row_X)

    @staticmethod
    def backward(ctx: Any, grad_XH: torch.Tensor) -> tuple[Any, ...]:
        return sum_copies(grad_XH, ctx.num_rows, *ctx.saved_tensors), None, None, None, None


class _Collect(torch.autograd.Function):
    """Sum of each row's copies; a copy's gradient is its row's."""

    @staticmethod
    def forward(
        ctx: Any,
        copies_XH: torch.Tensor,
        num_rows: int,
        row_X: torch.Tensor,
        *by_row: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(row_X)
        return sum_copies(copies_XH, num_rows, row_X, *by_row)

    @staticmethod
    def backward(ctx: Any, grad_YH: torch.Tensor) -> tuple[Any, ...]:
        (row_X,) = ctx.saved_tensors
        return grad_YH.index_select(0, row_X), None, None, None, None
