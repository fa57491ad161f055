"""Transformer Engine's own Python from a checkout, with its kernels replaced by the definitions.

Its quantisers, tensors, recipes and GroupedLinear are the real ones, and so are the checks of their
arguments. They call the definitions of `tests/doubles/fp8.py` as kernels, on any device: on the
meta device these give shapes and dtypes alone. The native library, what only it has, and packages
that are not installed are replaced by nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from tests.doubles import fp8

_NAME = "transformer_engine"
# Packages whose own `__init__` would import the native library, or all layers.
_BARE = (_NAME, f"{_NAME}.common", f"{_NAME}.pytorch", f"{_NAME}.pytorch.module")
_ABSENT = (f"{_NAME}.pytorch.cpp_extensions.fused_attn", f"{_NAME}.pytorch.onnx_extensions")
_DTYPES = "Byte Int32 Float32 Float16 BFloat16 Float8E4M3 Float8E5M2 Float4E2M1"
_KINDS = {"kFloat8E4M3": fp8.E4M3, "kFloat8E5M2": fp8.E5M2}
_SQUARE, _ROW, _COLUMN = (128, 128), (1, 128), (128, 1)
_MX_ROW, _MX_COLUMN = (1, 32), (32, 1)


@contextlib.contextmanager
def te_python(checkout: Path) -> Iterator[None]:
    """Let Transformer Engine be imported from a checkout inside the block."""
    modules: dict[str, Any] = {name: _bare(name, checkout) for name in _BARE}
    modules |= {name: mock.MagicMock(__all__=[]) for name in _ABSENT}
    native = modules[f"{_NAME}_torch"] = mock.MagicMock(__all__=[])
    native.DType = enum.IntEnum(  # type: ignore[misc]
        "DType", {f"k{name}": at for at, name in enumerate(_DTYPES.split())}
    )
    native.get_num_cublas_streams = lambda: 4
    native.quantize, native.split_quantize = quantize, split_quantize
    native.fp8_transpose = lambda values_RK, _, out=None: values_RK.t().contiguous()
    native.te_general_grouped_gemm = grouped_gemm
    modules["pydantic"] = ModuleType("pydantic")
    modules["pydantic.dataclasses"] = mock.MagicMock(dataclass=dataclasses.dataclass)
    with mock.patch.dict(sys.modules, modules):
        grouped = importlib.import_module(f"{_NAME}.pytorch.module.grouped_linear")
        gemm = importlib.import_module(f"{_NAME}.pytorch.cpp_extensions.gemm")
        workspace = torch.empty(1, dtype=torch.uint8)
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
            mock.patch.object(torch.Tensor, "is_cuda", True),
            mock.patch.object(grouped, "clear_tensor_data"),  # frees memory early
            mock.patch.object(gemm, "get_sm_count", lambda: 1),
            mock.patch.object(gemm, "_empty_tensor", lambda: workspace),
            mock.patch.object(gemm, "get_cublas_workspace", lambda *_: [workspace]),
        ):
            yield


def _bare(name: str, checkout: Path) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(checkout.joinpath(*name.split(".")))]
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    return module


def quantize(matrix: torch.Tensor, quantizer: Any) -> Any:
    """Quantise along the directions that the quantiser asks for, into its own class."""
    kind = _KINDS[quantizer.dtype.name]
    name = type(quantizer).__name__
    parts: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if name == "Float8CurrentScalingQuantizer":
        values, scale = fp8.per_tensor(matrix, kind)
        data = values.view(torch.uint8)
        parts |= {"data": data if quantizer.rowwise_usage else None, "fp8_scale_inv": scale}
        parts["data_transpose"] = data.t().contiguous() if quantizer.columnwise_usage else None
    else:
        for usage in ("rowwise", "columnwise"):
            parts |= {f"{usage}_data": None, f"{usage}_scale_inv": None}
            if getattr(quantizer, f"{usage}_usage"):
                data, scales = _direction(matrix, quantizer, kind, usage == "columnwise")
                parts |= {f"{usage}_data": data, f"{usage}_scale_inv": scales}
        if name == "MXFP8Quantizer":
            # Swizzling changes the places of scales alone.
            parts["with_gemm_swizzled_scales"] = quantizer.optimize_for_gemm
        else:
            parts["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    tensors = importlib.import_module(f"{_NAME}.pytorch.tensor")
    prefix = {"Float8Cur": "Float8Tensor", "Float8Blo": "Float8BlockwiseQTensor"}
    of = prefix.get(name[:9], "MXFP8Tensor")
    if quantizer.internal:
        return getattr(tensors, f"{of}Storage")(**parts, fake_dtype=matrix.dtype)
    made: Any = getattr(tensors, of)
    return made(shape=matrix.shape, dtype=matrix.dtype, **parts)


def _direction(
    matrix: torch.Tensor, quantizer: Any, kind: torch.dtype, by_columns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes and scales in Transformer Engine's layout."""
    if type(quantizer).__name__ == "MXFP8Quantizer":
        values, scales = fp8.mx(matrix, kind, by_columns=by_columns)
        data = values.view(torch.uint8)
    else:
        square = quantizer.block_scaling_dim == 2
        block = _SQUARE if square else _COLUMN if by_columns else _ROW
        values, scales = fp8.by_blocks(matrix, kind, block)
        data = values.view(torch.uint8)
        data = data.t().contiguous() if by_columns else data
        # Scales of single rows lie transposed, those of square blocks as their values do.
        scales = scales.t() if by_columns == square else scales
    shape = quantizer.get_scale_shape(matrix.shape, by_columns)
    padded = torch.full(shape, 3, dtype=scales.dtype, device=scales.device)
    padded[tuple(map(slice, scales.shape))].copy_(scales)
    return data, padded


def split_quantize(
    matrix: torch.Tensor, sizes: Sequence[int], quantizers: Sequence[Any], **_: Any
) -> list[Any]:
    parts = zip(matrix.split(list(sizes)), quantizers, strict=True)
    return [quantize(part.contiguous(), quantizer) for part, quantizer in parts]


def values_of(tensor: Any, by_columns: bool) -> torch.Tensor:
    """Return float32 values that a product takes from a quantised operand along one direction."""
    usage = "columnwise" if by_columns else "rowwise"
    kind = _KINDS[tensor._fp8_dtype.name]
    if hasattr(tensor, "_transpose"):
        data = tensor._transpose if by_columns else tensor._data
        again = fp8.dequantised(fp8.Quantised(data.view(kind), tensor._scale_inv))
        return again.t() if by_columns else again
    data, scales = (getattr(tensor, f"_{usage}_{part}") for part in ("data", "scale_inv"))
    if not hasattr(tensor, "_is_2D_scaled"):
        block = _MX_COLUMN if by_columns else _MX_ROW
    else:
        square = tensor._is_2D_scaled
        data = data.t() if by_columns else data
        scales = scales.t() if by_columns == square else scales
        block = _SQUARE if square else _COLUMN if by_columns else _ROW
    used = tuple(
        slice(math.ceil(size / side)) for size, side in zip(data.shape, block, strict=True)
    )
    return fp8.dequantised(fp8.Quantised(data.view(kind), scales[used]), block)


def grouped_gemm(
    firsts: Sequence[Any],
    turns_first: bool,
    seconds: Sequence[Any],
    turns_second: bool,
    outs: Sequence[torch.Tensor],
    *others: Any,
) -> list[Any]:
    """Multiply as cuBLAS would, by column-major operands, into the outputs."""
    _, sizes, biases, _, single_output, _, _, _, _, accumulate = others[:10]
    expected = list(outs[0].split(list(sizes))) if single_output else list(outs)
    assert not accumulate and len(firsts) == len(seconds) == len(expected)
    for first, second, out in zip(firsts, seconds, expected, strict=True):
        left, right = values_of(second, turns_second), values_of(first, not turns_first)
        product = (left.t() if turns_second else left) @ (right.t() if turns_first else right)
        assert product.shape == out.shape
        out.copy_(product.to(out.dtype))
    return list(biases)
