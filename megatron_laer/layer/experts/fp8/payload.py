"""Payload of a quantised matrix: a matrix of bytes, which exchanges move like any other.

First come the R rows of 8-bit values, then their scales, in as many whole rows as they take. So the
values keep the matrix's alignment, and a relay can cut the payload by rows. Nothing is quantised
here.

Legend: R rows of a matrix, K columns, P rows of its payload.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_laer.precision import Precision
from megatron_laer.runtime.comm.memory import Memory, empty
from megatron_laer.runtime.weights.share import Carried

_DTYPES = {4: torch.float32, 1: torch.uint8}


@dataclass(frozen=True)
class PayloadForm:
    """Sizes of a matrix's payload in a precision, along rows or along columns."""

    precision: Precision
    rows: int
    columns: int
    by_columns: bool = False

    @property
    def scales_shape(self) -> tuple[int, ...]:
        row = self.precision.row
        return row.scales_shape(self.rows, self.columns, by_columns=self.by_columns)

    @property
    def scales_dtype(self) -> torch.dtype:
        return _DTYPES[self.precision.row.scale_bytes]

    @property
    def payload_rows(self) -> int:
        """Return P."""
        return self.precision.row.payload_rows(self.rows, self.columns)

    @property
    def carried(self) -> Carried:
        return Carried(self.payload_rows, self.columns, torch.uint8)

    def pack(
        self, values_RK: torch.Tensor, scales: torch.Tensor, memory: Memory = empty
    ) -> torch.Tensor:
        """Return the payload [P, K] of 8-bit values, or their bytes, and scales.

        Scales may be padded, which the payload's are not.
        """
        assert values_RK.shape == (self.rows, self.columns) and values_RK.element_size() == 1
        assert scales.dtype == self.scales_dtype and scales.dim() == len(self.scales_shape)
        shape = (self.payload_rows, self.columns)
        payload_PK = memory(shape, torch.uint8, values_RK.device)
        payload_PK[: self.rows].copy_(values_RK.view(torch.uint8))
        payload_PK[self.rows :].zero_()
        self.unpack(payload_PK)[1].copy_(scales[tuple(map(slice, self.scales_shape))])
        return payload_PK

    def unpack(self, payload_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values' bytes [R, K] and the scales, both in the payload's memory."""
        num_bytes = math.prod(self.scales_shape) * self.scales_dtype.itemsize
        rest = payload_PK[self.rows :].reshape(-1)[:num_bytes]
        return payload_PK[: self.rows], rest.view(self.scales_dtype).view(self.scales_shape)


@dataclass(frozen=True)
class PayloadPacker:
    """`Packer` of payloads of one form; `quantise` returns values, or their bytes, and scales."""

    form: PayloadForm
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def carried(self) -> Carried:
        return self.form.carried

    def pack(self, weight_RK: torch.Tensor, memory: Memory = empty) -> torch.Tensor:
        return self.form.pack(*self.quantise(weight_RK), memory)
