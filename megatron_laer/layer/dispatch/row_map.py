"""Map of rows to copies: it spreads rows to positions, and collects sums of copies.

Spreading and collecting are each other's gradients. No collective is run.

Legend: Y rows, X copies of them, H hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laer.runtime.comm.segments import kernels_of

_Kept = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


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

    def keeping_rows(
        self, copies_XH: torch.Tensor, rows_YH: torch.Tensor
    ) -> AbstractContextManager[Any]:
        """Return a context in which autograd saves rows in place of their spread copies.

        Experts save consecutive copies each. The caller must reference the copies while in the
        context.
        """
        rows_YH = rows_YH.detach()
        # Not the tensor, since autograd's saved values reference `pack`.
        copies = _Place.of(copies_XH)

        def pack(saved: torch.Tensor) -> _Kept:
            if not saved.numel():  # of an expert without tokens; a view would hold all copies
                return saved.new_empty(saved.shape)
            first = copies.first_of(saved)
            return saved if first is None else (rows_YH, self.row_X[first : first + len(saved)])

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

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


@dataclass(frozen=True)
class _Place:
    """Memory of a contiguous matrix of `size` bytes."""

    address: int
    size: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, matrix: torch.Tensor) -> _Place:
        assert matrix.is_contiguous()
        return cls(matrix.data_ptr(), matrix.nbytes, matrix.shape[1], matrix.dtype)

    def first_of(self, tensor: torch.Tensor) -> int | None:
        """Return the first row of the matrix that a tensor of whole rows shows, or None."""
        # The transpose of a square matrix has the same shape.
        if tensor.dtype != self.dtype or tensor.stride() != (self.width, 1):
            return None
        offset = tensor.data_ptr() - self.address
        row, rest = divmod(offset, self.width * self.dtype.itemsize)
        fits = tensor.shape[1] == self.width and 0 <= offset <= self.size - tensor.nbytes
        return row if fits and rest == 0 else None


def _unpack(kept: _Kept) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    rows_YH, row_X = kept
    return rows_YH.index_select(0, row_X)


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
