"""First launches of the exchanges' Triton kernels, before training, so that no step compiles one.

Triton compiles a kernel for each dtype, constant, alignment and specialised number that it meets.
Those depend on matrices and settings, and not on layouts or ways. So each kernel is launched here
for a single row, with all tensors that exchanges can give it.

Legend: K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_laer.runtime.comm.segments import Part, Segments, Table, exchange_kernels
from megatron_laer.runtime.weights.layer import Carried, Share

# Triton specialises on whether a tensor's address is a multiple of this.
_ALIGNMENT = 16

# One row of a holding and of the wire, in a table that has nothing else.
_ROW = Segments(0, 1, 1, 1, 1, (0, 0), [Part(0, 0, 0, 1, 0, 1)])


@torch.no_grad()
def launch_exchange_kernels(
    share: Share, num_experts: int, *, holds_step: bool, wire_dtype: torch.dtype | None
) -> None:
    """Launch what restores and reduces of a layer launch, by any way.

    Args:
        holds_step: whether a step's gradients are summed, in float32.
        wire_dtype: of gradients between hops, if it is not the weights'.
    """
    if exchange_kernels(share.likes[0].device) is None:
        return
    table = Table(np.array([*(0, 0, 1), *(0, 1)]), share.likes[0].device)
    sources = share.sources(num_experts)
    for at, (like, carried) in enumerate(zip(share.likes, share.carried, strict=True)):
        # A payload is memory of its own, aligned as any.
        own = _rows_like(sources[at]) if carried.dtype == like.dtype else []
        _copy(table, _row(like, carried), own)
        if at not in share.trained_at:
            continue
        grads = {like.dtype, torch.float32} if holds_step else {like.dtype}
        form = Carried(share.rows[at], share.columns[at], like.dtype)
        summed = [form._replace(dtype=dtype) for dtype in {*grads, wire_dtype or like.dtype}]
        target = share.grad_target(at, num_experts)
        targets = [] if target is None else _rows_like(target)
        for of_part in summed:
            if of_part.dtype in grads:
                _copy(table, _row(like, of_part), [])
            part = _row(like, of_part)
            for of_sum in summed:
                # New sums of home experts lie one behind the other.
                for offset in {0, of_sum.num_bytes % _ALIGNMENT}:
                    for adds in {False, target is None}:
                        table.add(_ROW, part, [_row(like, of_sum, offset)], adds=adds)
            for target in targets:
                table.add(_ROW, part, [target], adds=True)


def _copy(table: Table, slots: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
    """Copy a row of slots or sources to a buffer, and back; a group of one needs no buffer."""
    buffer = torch.empty_like(slots)
    for held in (slots, *sources):
        table.pack(_ROW, [held], buffer)
        table.unpack(_ROW, held, [buffer])


def _row(like: torch.Tensor, form: Carried, offset: int = 0) -> torch.Tensor:
    """Return an uninitialised row, [1, K], this number of bytes behind an aligned address."""
    first = offset // form.dtype.itemsize
    return like.new_empty(first + form.columns, dtype=form.dtype)[first:].unsqueeze(0)


def _rows_like(matrices: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return an uninitialised row of each matrix or stack of such, aligned as its first."""
    each = [matrices] if isinstance(matrices, torch.Tensor) else matrices
    return [
        _row(one, Carried(1, one.shape[-1], one.dtype), one.data_ptr() % _ALIGNMENT) for one in each
    ]
