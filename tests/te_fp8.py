"""Replacements of Transformer Engine's quantisers, tensors and grouped GEMM in fp8.

They do what it documents, by the definitions in `tests/doubles/fp8.py`. They refuse sizes that its
kernels do, and leave scales of padding undefined, as these do. One class stands for those of all
recipes, which its arguments tell apart.
"""

from __future__ import annotations

import contextlib
from abc import ABCMeta
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch

from megatron_laer.layer.experts.fp8 import te
from megatron_laer.precision import Precision, recipe_of
from tests.doubles import fp8
from tests.doubles.fp8_experts import fp8_replaced
from tests.doubles.fp8_parameters import Fp8Parameter

KINDS = {"e4m3": fp8.E4M3, "e5m2": fp8.E5M2}
UNDEFINED = 255  # NaN as a scale of mxfp8
_SQUARE = (128, 128)
# Rows and columns of padded scales are multiples of these, by the block of a scale.
_TILES: dict[Any, tuple[int, ...]] = {
    _SQUARE: (1, 4),
    fp8.MX_ROWS: (128, 4),
    fp8.MX_COLUMNS: (4, 128),
}


def _padded(sizes: Any, block: tuple[int, int] | None) -> tuple[int, ...]:
    tile = _TILES.get(block, (1,) * len(sizes))
    return tuple(-(-size // side) * side for size, side in zip(sizes, tile, strict=True))


class Tensor(metaclass=ABCMeta):
    """Bytes and scales of a matrix along its rows, its columns or both, and its values again."""

    def __new__(
        cls,
        *,
        shape: Any,
        dtype: torch.dtype,
        fp8_dtype: str,
        data: Any = None,
        fp8_scale_inv: Any = None,
        rowwise_data: Any = None,
        rowwise_scale_inv: Any = None,
        columnwise_data: Any = None,
        columnwise_scale_inv: Any = None,
        quantizer: Any = None,
        is_2D_scaled: bool | None = None,
        with_gemm_swizzled_scales: bool | None = None,
    ) -> Tensor:
        made: Any = super().__new__(cls)
        made._data, made._scale_inv = data, fp8_scale_inv
        made._rowwise_data, made._rowwise_scale_inv = rowwise_data, rowwise_scale_inv
        made._columnwise_data, made._columnwise_scale_inv = columnwise_data, columnwise_scale_inv
        assert not with_gemm_swizzled_scales
        is_mx = with_gemm_swizzled_scales is not None
        made.multiple = fp8.MX_BLOCK if is_mx else 16
        by_blocks = fp8.MX_ROWS if is_mx else _SQUARE if is_2D_scaled else (1, 128)
        made.turns = is_2D_scaled or data is not None
        rows = (
            (data, fp8_scale_inv, None)
            if data is not None
            else (rowwise_data, rowwise_scale_inv, by_blocks)
        )
        columns = columnwise_data, columnwise_scale_inv, by_blocks[::-1]
        made.by_rows, made.by_columns = (
            None if values is None else _again(values, scales, KINDS[fp8_dtype], block, shape)
            for values, scales, block in (rows, columns)
        )
        (made.device,) = {part.device for part in (rows[0], columns[0]) if part is not None}
        return cast("Tensor", made)

    multiple: int
    turns: bool
    device: torch.device
    by_rows: Any
    by_columns: Any

    def update_usage(self, columnwise_usage: bool) -> None:
        assert self.turns, "only one scale, and those of square blocks, are those of the transpose"
        self.by_columns = self.by_rows


def _again(
    data: torch.Tensor, scales: torch.Tensor, kind: torch.dtype, block: Any, shape: Any
) -> torch.Tensor:
    assert data.shape == shape and data.dtype == torch.uint8
    assert data.is_contiguous() and scales.is_contiguous()
    sizes = (1,)
    if block is not None:
        sizes = tuple(-(-size // side) for size, side in zip(data.shape, block, strict=True))
    assert scales.shape == _padded(sizes, block)
    own = scales[tuple(map(slice, sizes))]
    return fp8.dequantised(fp8.Quantised(data.view(kind), own), block)


class Quantiser:
    """Quantiser of a matrix: with a device by one scale, with dimensions by blocks, else mxfp8."""

    def __init__(
        self,
        fp8_dtype: str,
        device: torch.device | None = None,
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool | None = None,
        amax_epsilon: float | None = None,
        block_scaling_dim: int | None = None,
    ) -> None:
        is_mx = device is None and block_scaling_dim is None
        assert rowwise and amax_epsilon == (None if is_mx else 0.0)
        assert force_pow_2_scales == (None if is_mx else device is None)
        self.kind, self.is_mx, self.is_whole = fp8_dtype, is_mx, device is not None
        by_rows = _SQUARE if block_scaling_dim == 2 else fp8.MX_ROWS if is_mx else (1, 128)
        self.blocks = {"rowwise": by_rows, "columnwise": by_rows[::-1]}
        self.rowwise, self.columnwise = rowwise, columnwise

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, matrix: torch.Tensor) -> Tensor:
        assert matrix.is_contiguous()
        named: dict[str, Any] = {
            "shape": matrix.shape,
            "dtype": matrix.dtype,
            "fp8_dtype": self.kind,
        }
        kind = KINDS[self.kind]
        if self.is_whole:
            assert matrix.shape[1] % 16 == 0
            assert self.rowwise, "columns are made from rows"
            values, scale = fp8.per_tensor(matrix, kind)
            made = Tensor(data=values.view(torch.uint8), fp8_scale_inv=scale, **named)
            if self.columnwise:
                made.update_usage(columnwise_usage=True)
            return made
        if self.is_mx:
            assert not any(size % fp8.MX_BLOCK for size in matrix.shape)
            named["with_gemm_swizzled_scales"] = False
        else:
            named["is_2D_scaled"] = self.blocks["rowwise"] == _SQUARE
        parts: dict[str, Any] = {}
        for name, asked in (("rowwise", self.rowwise), ("columnwise", self.columnwise)):
            if asked:
                values, scales = fp8.quantised(matrix, kind, self.blocks[name])
                padded = scales.new_full(_padded(scales.shape, self.blocks[name]), UNDEFINED)
                padded[tuple(map(slice, scales.shape))] = scales
                parts |= {f"{name}_data": values.view(torch.uint8), f"{name}_scale_inv": padded}
        return Tensor(**parts, **named)


def grouped_gemm(
    A: list[Tensor],
    B: list[Tensor],
    out: list[torch.Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    *,
    layout: str,
    m_splits: list[int],
    grad: bool,
    use_split_accumulator: bool,
    single_output: bool = False,
) -> None:
    """Multiply column-major operands, in float32, and refuse sizes that cuBLAS does."""
    assert len(A) == len(B) == len(m_splits) == len(quantization_params)
    assert grad == (layout != "TN") and use_split_accumulator == grad
    outs = out[0].split(m_splits) if single_output else out
    for first, second, tokens, product in zip(A, B, m_splits, outs, strict=True):
        assert tokens > 0 and tokens % second.multiple == 0
        assert all(size % 16 == 0 for size in product.shape)
        # Only what was quantised along the product's direction is there.
        left = second.by_columns.t() if layout[1] == "T" else second.by_rows
        right = first.by_rows.t() if layout[0] == "T" else first.by_columns
        product.copy_((left @ right).to(out_dtype))


MODULES: dict[str, Any] = {
    f"{te.TENSORS}.float8_tensor": SimpleNamespace(
        Float8CurrentScalingQuantizer=Quantiser, Float8Tensor=Tensor
    ),
    f"{te.TENSORS}.float8_blockwise_tensor": SimpleNamespace(
        Float8BlockQuantizer=Quantiser, Float8BlockwiseQTensor=Tensor
    ),
    f"{te.TENSORS}.mxfp8_tensor": SimpleNamespace(MXFP8Quantizer=Quantiser, MXFP8Tensor=Tensor),
    f"{te.TENSORS}.storage.float8_tensor_storage": SimpleNamespace(Float8TensorStorage=Tensor),
    "transformer_engine_torch": SimpleNamespace(
        DType=SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2")
    ),
}


def settings_of(config: Any) -> SimpleNamespace:
    """Return a recipe's settings, in place of Megatron's `get_fp8_recipe`; mxfp8 has none."""
    recipe = recipe_of(config)
    if recipe == Precision.MXFP8:
        return SimpleNamespace()
    exact = SimpleNamespace(power_2_scale=recipe == Precision.BLOCKWISE, amax_epsilon=0.0)
    products = {"fprop": False, "dgrad": True, "wgrad": True}
    return SimpleNamespace(
        fp8_quant_fwd_inp=exact,
        fp8_quant_fwd_weight=exact,
        fp8_quant_bwd_grad=exact,
        **{
            f"fp8_gemm_{name}": SimpleNamespace(use_split_accumulator=splits)
            for name, splits in products.items()
        },
    )


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Let the products in fp8 have these parts in this context."""
    from megatron.core import fp8_utils

    imports = SimpleNamespace(import_module=MODULES.__getitem__)
    with (
        mock.patch.object(te, "importlib", imports),
        mock.patch.object(te.grouped, "grouped_gemm", lambda: grouped_gemm),
        mock.patch.object(fp8_utils, "get_fp8_recipe", settings_of),
    ):
        yield


Tensor.register(Fp8Parameter)


@contextlib.contextmanager
def replaced_on_cpu() -> Iterator[None]:
    """Compute experts in fp8 in this context, in stock, at home and in replicas."""
    with fp8_replaced(), replaced(), mock.patch.object(te, "problem", lambda *_: None):
        yield
