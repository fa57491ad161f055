"""Mark of a slice, for optimizers that need whole matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WholeMatrix:
    """Matrix that a parameter is a slice of.

    Attributes:
        rows: R of each expert's whole matrix.
        partition_dim: stock's attribute: the dimension that tensor ranks would split.
    """

    rows: int
    partition_dim: int


def whole_matrix_of(parameter: torch.Tensor) -> WholeMatrix | None:
    return getattr(parameter, "whole_matrix", None)
