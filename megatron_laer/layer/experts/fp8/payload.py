"""Payload of a quantised matrix: a matrix of bytes, which exchanges move like any other.

First come the R rows of fp8 values, then their scales, in as many whole rows as they take. So the
values keep the matrix's alignment, and a relay can cut the payload by rows. Nothing is quantised
here.

Legend: R rows of a matrix, K columns, P rows of its payload.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_laer.runtime.weights.layer import Carried

# Sides of the blocks that share a scale: square ones of weights, and those of mxfp8.
BLOCK = 128
MX_BLOCK = 32
# Columns of scales of square blocks come in fours, as cuBLAS takes them.
_SCALES = 4


@dataclass(frozen=True)
class PayloadForm:
    """Sizes of a matrix's payload, by the scales of its recipe."""

    rows: int
    columns: int
    scales_shape: tuple[int, ...]
    scales_dtype: torch.dtype

    @property
    def payload_rows(self) -> int:
        """Return P."""
        return self.rows + -(-self._scale_bytes // self.columns)

    @property
    def carried(self) -> Carried:
        return Carried(self.payload_rows, self.columns, torch.uint8)

    def pack(self, values_RK: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the payload [P, K] of fp8 values, or their bytes, and scales.

        These may have less padding than the form, or more.
        """
        assert values_RK.shape == (self.rows, self.columns) and values_RK.element_size() == 1
        assert scales.dtype == self.scales_dtype and scales.dim() == len(self.scales_shape)
        shape = (self.payload_rows, self.columns)
        payload_PK = torch.empty(shape, dtype=torch.uint8, device=values_RK.device)
        payload_PK[: self.rows].copy_(values_RK.view(torch.uint8))
        payload_PK[self.rows :].zero_()
        sizes = zip(scales.shape, self.scales_shape, strict=True)
        given = tuple(slice(min(both)) for both in sizes)
        self.unpack(payload_PK)[1][given].copy_(scales[given])
        return payload_PK

    def unpack(self, payload_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values' bytes [R, K] and the scales, both in the payload's memory."""
        rest = payload_PK[self.rows :].reshape(-1)[: self._scale_bytes]
        return payload_PK[: self.rows], rest.view(self.scales_dtype).view(self.scales_shape)

    @property
    def _num_scales(self) -> int:
        return math.prod(self.scales_shape)

    @property
    def _scale_bytes(self) -> int:
        return self._num_scales * self.scales_dtype.itemsize


@dataclass(frozen=True)
class BackwardPacker:
    """`Packer` of payloads that backward multiplies by, where those of forward differ.

    Attributes:
        quantise: returns values, or their bytes, and scales.
    """

    form: PayloadForm
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def for_backward(self) -> BackwardPacker:
        return self

    @property
    def carried(self) -> Carried:
        return self.form.carried

    def pack(self, weight_RK: torch.Tensor) -> torch.Tensor:
        return self.form.pack(*self.quantise(weight_RK))


def per_tensor_form(rows: int, columns: int) -> PayloadForm:
    """Return the form of a matrix with one scale, in both directions."""
    return PayloadForm(rows, columns, (1,), torch.float32)


def block_form(rows: int, columns: int) -> PayloadForm:
    """Return the form of a matrix with a scale for each square block, in both directions."""
    scales_columns = -(-columns // (BLOCK * _SCALES)) * _SCALES
    return PayloadForm(rows, columns, (-(-rows // BLOCK), scales_columns), torch.float32)


def mx_form(rows: int, columns: int, *, by_columns: bool) -> PayloadForm:
    """Return the form of a matrix with an 8-bit scale for each block of a row, or of a column."""
    along_rows = (rows, -(-columns // MX_BLOCK))
    along_columns = (-(-rows // MX_BLOCK), columns)
    return PayloadForm(rows, columns, along_columns if by_columns else along_rows, torch.uint8)
