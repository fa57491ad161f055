"""Replacements of Transformer Engine's quantiser and tensor of mxfp8, by the definitions.

They refuse shapes that its kernels do, and leave scales of padding undefined, as these do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.doubles import fp8

BLOCK = 32
# Rows and columns of padded scales are multiples of these, by direction.
TILES = {False: (128, 4), True: (4, 128)}
UNDEFINED = 255  # NaN as a scale
KINDS = {"e4m3": fp8.E4M3, "e5m2": fp8.E5M2}


class MxTensor:
    multiple = BLOCK

    def __new__(
        cls,
        *args: Any,
        rowwise_data: Any,
        rowwise_scale_inv: Any,
        columnwise_data: Any,
        columnwise_scale_inv: Any,
        fp8_dtype: Any,
        quantizer: Any,
        with_gemm_swizzled_scales: bool,
        **kwargs: Any,
    ) -> MxTensor:
        made = super().__new__(cls)
        assert {*kwargs} == {"shape", "dtype"} and not with_gemm_swizzled_scales
        given = rowwise_data if columnwise_data is None else columnwise_data
        assert given.shape == kwargs["shape"] and not any(size % BLOCK for size in given.shape)
        made.device = given.device
        made.by_rows = _again(rowwise_data, rowwise_scale_inv, fp8_dtype, by_columns=False)
        made.by_columns = _again(columnwise_data, columnwise_scale_inv, fp8_dtype, by_columns=True)
        made._rowwise_data, made._rowwise_scale_inv = rowwise_data, rowwise_scale_inv
        made._columnwise_data, made._columnwise_scale_inv = columnwise_data, columnwise_scale_inv
        return made

    device: torch.device
    by_rows: torch.Tensor | None
    by_columns: torch.Tensor | None
    _rowwise_data: Any
    _rowwise_scale_inv: Any
    _columnwise_data: Any
    _columnwise_scale_inv: Any


def _again(values: Any, scales: Any, kind: str, *, by_columns: bool) -> torch.Tensor | None:
    if values is None:
        assert scales is None
        return None
    assert values.dtype == scales.dtype == torch.uint8
    assert values.is_contiguous() and scales.is_contiguous()
    rows, columns = blocks_of(values.shape, by_columns)
    assert scales.shape == padded_shape((rows, columns), by_columns)
    block = (BLOCK, 1) if by_columns else (1, BLOCK)
    quantised = fp8.Quantised(values.view(KINDS[kind]), scales[:rows, :columns])
    return fp8.dequantised(quantised, block)


def blocks_of(shape: Any, by_columns: bool) -> tuple[int, int]:
    rows, columns = shape
    return (rows // BLOCK, columns) if by_columns else (rows, columns // BLOCK)


def padded_shape(sizes: tuple[int, int], by_columns: bool) -> tuple[int, ...]:
    return tuple(
        -(-size // tile) * tile for size, tile in zip(sizes, TILES[by_columns], strict=True)
    )


class MxQuantiser:
    def __init__(self, fp8_dtype: str, *, rowwise: bool = True, columnwise: bool = True) -> None:
        self.kind, self.rowwise, self.columnwise = fp8_dtype, rowwise, columnwise

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, matrix: torch.Tensor) -> MxTensor:
        assert matrix.is_contiguous() and not any(size % BLOCK for size in matrix.shape)
        parts: dict[str, Any] = {}
        for name, asked in (("rowwise", self.rowwise), ("columnwise", self.columnwise)):
            parts |= {f"{name}_data": None, f"{name}_scale_inv": None}
            if asked:
                by_columns = name == "columnwise"
                values, scales = fp8.mx(matrix, KINDS[self.kind], by_columns=by_columns)
                shape = padded_shape(tuple(scales.shape), by_columns)
                padded = torch.full(shape, UNDEFINED, dtype=torch.uint8, device=matrix.device)
                padded[: scales.shape[0], : scales.shape[1]] = scales
                parts |= {f"{name}_data": values.view(torch.uint8), f"{name}_scale_inv": padded}
        return MxTensor(
            shape=matrix.shape,
            dtype=matrix.dtype,
            fp8_dtype=self.kind,
            quantizer=self,
            with_gemm_swizzled_scales=False,
            **parts,
        )


MODULE = SimpleNamespace(MXFP8Quantizer=MxQuantiser, MXFP8Tensor=MxTensor)
