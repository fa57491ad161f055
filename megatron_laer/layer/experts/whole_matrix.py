"""`WholeMatrix` marks a slice, for optimizers that need whole matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WholeMatrix:
    """The matrix that a parameter is a slice of.

    Attributes:
        rows: R of each expert's whole matrix.
        partition_dim: the mark of stock's parameter: the dimension that tensor ranks would cut.
    """

    rows: int
    partition_dim: int


def whole_matrix_of(parameter: torch.Tensor) -> WholeMatrix | None:
    """Return a parameter's mark; None if it is no slice of matrices."""
    return getattr(parameter, "whole_matrix", None)
