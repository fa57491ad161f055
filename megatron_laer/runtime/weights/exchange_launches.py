"""First launches of the exchanges' Triton kernels, before training, so that no step compiles one.

Triton compiles a kernel for each dtype, constant, alignment and specialised number that it meets.
Those depend on matrices and settings, and not on layouts or ways. So each kernel is launched here
for a single row, with all tensors that exchanges can give it.

Legend: K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from megatron_laer.runtime.comm.segments import Segments, Table, exchange_kernels
from megatron_laer.runtime.weights.share import Share

# Triton specialises on whether a tensor's address is a multiple of this.
_ALIGNMENT = 16

# One row of a holding and of the wire, in a table that has nothing else.
_ROW = Segments(0, 1, 1, 1, 1, 0)


@torch.no_grad()
def launch_exchange_kernels(
    share: Share, *, holds_step: bool, wire_dtype: torch.dtype | None
) -> None:
    """Launch what restores and reduces of a layer launch, by any way.

    Args:
        holds_step: whether a step's gradients are summed, in float32.
        wire_dtype: of gradients between hops, if it is not the weights'.
    """
    device = share.device
    if exchange_kernels(device) is None:
        return
    table = Table(np.array([*(0, 0, 0, 1), *(0, 1)]), device)
    weights, form = share.weights(), share.form
    rows = [torch.empty(1, form.columns, dtype=form.dtype, device=device)]
    for at, one in enumerate(chain(*share.owned)):
        if one.packer is None:  # a payload's memory is aligned as any
            rows.append(_row_like(weights[at]))
    _copy(table, rows)
    if not share.trained_at:
        return
    form, targets = share.grads_form, share.sums_in_rows(share.new_sums())
    grads = {form.dtype, torch.float32} if holds_step else {form.dtype}
    wire = wire_dtype or form.dtype
    between = torch.empty(1, form.columns, dtype=wire, device=device)
    for dtype in {*grads, wire}:
        part = torch.empty(1, form.columns, dtype=dtype, device=device)
        if dtype in grads:
            _copy(table, [part])
        for adds, sums in ((False, [between]), (True, map(_row_like, targets))):
            for row in sums:
                table.place([row])
                table.add(_ROW, part, [row], adds=adds)


def _copy(table: Table, rows: Sequence[torch.Tensor]) -> None:
    """Copy rows of slots and of owned tensors to a buffer, and back."""
    buffer = torch.empty_like(rows[0])
    for row in rows:
        table.place([row])
        table.pack(_ROW, [row], buffer)
        table.unpack(_ROW, buffer, [row])


def _row_like(rows: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised row, [1, K], aligned as the first one of these."""
    first = rows.data_ptr() % _ALIGNMENT // rows.element_size()
    return rows.new_empty(first + rows.shape[1])[first:].unsqueeze(0)
