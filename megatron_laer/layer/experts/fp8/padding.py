"""Rows of zeros between the tokens of slots, so that each slot has a multiple of rows.

Zeros change neither a largest value nor a product's other rows.

Legend: C slots, T tokens received, U rows with padding, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded_sizes(tokens_C: Sequence[int], multiple: int) -> list[int]:
    return [-(-tokens // multiple) * multiple for tokens in tokens_C]


def padded(tokens_TK: torch.Tensor, tokens_C: Sequence[int], multiple: int) -> torch.Tensor:
    """Return `[U, K]`, each slot's tokens and zeros after them; the same tensor if none is short.

    The result is contiguous.
    """
    sizes = padded_sizes(tokens_C, multiple)
    if sizes == list(tokens_C):
        return tokens_TK.contiguous()
    padded_UK = tokens_TK.new_zeros((sum(sizes), *tokens_TK.shape[1:]))
    parts = zip(padded_UK.split(sizes), tokens_TK.split(list(tokens_C)), strict=True)
    for padded_nK, part_nK in parts:
        padded_nK[: len(part_nK)].copy_(part_nK)
    return padded_UK


def unpadded(padded_UK: torch.Tensor, tokens_C: Sequence[int], multiple: int) -> torch.Tensor:
    """Return `[T, K]` without the rows that `padded` added."""
    sizes = padded_sizes(tokens_C, multiple)
    if sizes == list(tokens_C):
        return padded_UK
    parts = zip(padded_UK.split(sizes), tokens_C, strict=True)
    return torch.cat([padded_nK[:tokens] for padded_nK, tokens in parts])
