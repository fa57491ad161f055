"""Autograd keeps rows instead of their copies, and replaces nothing else.

Legend: Y rows, X copies of them, H hidden.
"""

from __future__ import annotations

import torch

from megatron_laer.layer.dispatch.row_map import row_map


def test_what_is_kept_of_copies_comes_back_as_it_was() -> None:
    """With as many copies as columns, a transpose has the shape of the copies."""
    rows_YH = torch.arange(8.0).view(2, 4).requires_grad_()
    map_ = row_map(torch.tensor([0, 1, 1, 0], dtype=torch.int32), 2)
    copies_XH = map_.spread(rows_YH)
    factor_HH = torch.arange(16.0).view(4, 4).requires_grad_()
    with map_.keeping_rows(copies_XH, rows_YH):
        straight, turned = copies_XH @ factor_HH, copies_XH.t() @ factor_HH
        part = copies_XH[1:] @ factor_HH
    weights = torch.arange(16.0).view(4, 4)
    total = (straight * weights).sum() + (turned * weights).sum() + (part * weights[1:]).sum()
    (found_HH,) = torch.autograd.grad(total, factor_HH)
    copies_XH = copies_XH.detach()
    expected_HH = copies_XH.t() @ weights + copies_XH @ weights
    expected_HH += copies_XH[1:].t() @ weights[1:]
    torch.testing.assert_close(found_HH, expected_HH)
