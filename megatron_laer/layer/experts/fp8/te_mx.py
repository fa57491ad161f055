"""Products in mxfp8 by Transformer Engine: an 8-bit scale for each 32 values of a row or column.

A matrix is other bytes along its rows, which forward multiplies, than along its columns, for
backward. So it has two payloads. Their scales are those of whole blocks: Transformer Engine's own
are padded to tiles of 128 x 4, and its GEMM swizzles them. A parameter in mxfp8 has bytes
of both directions, and scales that are not swizzled.

Legend: C slots, R rows of a matrix (output features), K columns, P rows of a payload.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch

from megatron_laer.layer.experts.fp8.payload import MX_BLOCK, BackwardPacker, mx_form
from megatron_laer.layer.experts.fp8.te import TENSORS, Needs, Quantised
from megatron_laer.runtime.weights.layer import Packer

# Rows and columns of a tile of scales along rows; those along columns are transposed.
_TILE = 128, 4


class Mx(Quantised):
    """Scales of 8 bits along rows and columns; tokens in multiples of 32."""

    _module = f"{TENSORS}.mxfp8_tensor"
    # Earlier ones cannot be told that scales are not swizzled.
    known: ClassVar[str] = "2.12 to 2.20"
    multiple: ClassVar[int] = MX_BLOCK
    needs: ClassVar[Needs] = {
        (_module, "MXFP8Quantizer"): {"fp8_dtype", "rowwise", "columnwise"},
        (_module, "MXFP8Tensor"): {"rowwise_data", "rowwise_scale_inv", "fp8_dtype", "quantizer"}
        | {"columnwise_data", "columnwise_scale_inv", "with_gemm_swizzled_scales"},
    }

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        super().__init__(config, mx_form(rows, columns, by_columns=False))
        self._tensors = importlib.import_module(self._module)
        form = mx_form(rows, columns, by_columns=True)
        self._by_columns = BackwardPacker(form, self._quantise_by_columns)

    @property
    def for_backward(self) -> Packer:
        return self._by_columns

    def _quantise_weight(self, weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self._in_fp8(weight_RK, by_columns=False)
        return made._rowwise_data, made._rowwise_scale_inv

    def _quantise_by_columns(self, weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self._in_fp8(weight_RK, by_columns=True)
        return made._columnwise_data, made._columnwise_scale_inv

    def _in_fp8(self, weight_RK: torch.Tensor, *, by_columns: bool) -> Any:
        if isinstance(weight_RK, self._tensors.MXFP8Tensor):
            return weight_RK
        return self._quantiser(self._forward_kind, by_columns)(weight_RK)

    def _weight(self, values_RK: torch.Tensor, scales: torch.Tensor) -> Any:
        return self._tensor(values_RK, scales, by_columns=False)

    def _backward_weights(self, payload_CPK: torch.Tensor) -> list[Any]:
        unpack = self._by_columns.form.unpack
        return [self._tensor(*unpack(one_PK), by_columns=True) for one_PK in payload_CPK.unbind()]

    def _tensor(self, values_RK: torch.Tensor, scales: torch.Tensor, *, by_columns: bool) -> Any:
        tile = _TILE[::-1] if by_columns else _TILE
        missing = [-size % side for size, side in zip(scales.shape, tile, strict=True)]
        if any(missing):
            scales = torch.nn.functional.pad(scales, (0, missing[1], 0, missing[0]))
        return self._tensors.MXFP8Tensor(
            shape=values_RK.shape,
            dtype=self._dtype,
            fp8_dtype=self._forward_kind,
            quantizer=self._quantiser(self._forward_kind, by_columns),
            with_gemm_swizzled_scales=False,
            rowwise_data=None if by_columns else values_RK,
            rowwise_scale_inv=None if by_columns else scales,
            columnwise_data=values_RK if by_columns else None,
            columnwise_scale_inv=scales if by_columns else None,
        )

    def _tokens_quantiser(self, kind: Any, parameters: Any, device: torch.device) -> Any:
        return self._quantiser(kind, by_columns=False)

    def _quantiser(self, kind: Any, by_columns: bool) -> Any:
        return self._tensors.MXFP8Quantizer(
            fp8_dtype=kind, rowwise=not by_columns, columnwise=by_columns
        )
