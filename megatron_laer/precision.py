"""Precisions of experts as rows of one table, read by payloads, prices, refusals and products.

In a recipe of fp8 a matrix travels as a payload: a byte for each value, then its scales in whole
rows. With two directions, backward multiplies by another payload, quantised along columns.

Sources: Transformer Engine 2.11 to 2.20, its quantisers, tensors and checks of cards.

Legend: R rows of a matrix, K columns, P rows of its payload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_laer.choices import Choice

# Megatron's default, which experts do not take.
MEGATRONS_RECIPE = "delayed"
# Arguments that the tensors and quantisers of more than one recipe take.
_QUANTISER = ("fp8_dtype", "rowwise", "columnwise")
_EXACT = (*_QUANTISER, "force_pow_2_scales", "amax_epsilon")
_DIRECTIONS = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")


class Cards(NamedTuple):
    """Compute capabilities, `first` to below `end`, and the release of CUDA that a recipe needs."""

    first: tuple[int, int]
    end: tuple[int, int] = (10**9, 0)
    cuda: tuple[int, int] = (0, 0)

    def include(self, capability: tuple[int, int], cuda: tuple[int, int]) -> bool:
        return self.first <= capability < self.end and self.cuda <= cuda

    def __str__(self) -> str:
        below = f" to below {dotted(self.end)}" if self.end[0] < 10**9 else " or higher"
        cuda = f" and CUDA {dotted(self.cuda)}" if self.cuda > (0, 0) else ""
        return f"compute capability {dotted(self.first)}{below}{cuda}"


class Part(NamedTuple):
    """Class of Transformer Engine, and arguments that it takes by name."""

    module: str
    name: str
    arguments: tuple[str, ...]


class Precision(Choice):
    """Precision of experts' products: their parameters', or one of Megatron's `--fp8-recipe`."""

    PARAMETERS = "parameters"
    TENSORWISE = "tensorwise"
    BLOCKWISE = "blockwise"
    MXFP8 = "mxfp8"

    @property
    def row(self) -> Quantisation:
        return _ROWS[self]

    @property
    def is_quantised(self) -> bool:
        return self is not Precision.PARAMETERS


@dataclass(frozen=True)
class Quantisation:
    """Form of the experts' matrices in a precision, and the place of its products.

    Attributes:
        block: rows and columns of a weight that share a scale; None for one scale of all.
        value_bytes: of one value; 0 for those of the parameters, which nothing quantises.
        scale_bytes: of one scale, which is float32 or an 8-bit exponent.
        tile: multiples of the rows and columns of scales that products take.
        directions: payloads of an expert; of two, each serves one direction.
        reads: passes over a tensor to quantise it; current scaling first finds its largest value.
        multiple: of rows and columns of operands.
        rows_for_columns: whether tokens along columns are made from those along rows.
        cards: those that compute its products.
        releases: of Transformer Engine, whose classes take the arguments here.
        signature: class whose parameters are those of `tensor`.
    """

    block: tuple[int, int] | None
    quantiser: Part
    tensor: Part
    cards: Cards
    value_bytes: int = 1
    scale_bytes: int = 4
    tile: tuple[int, ...] = (1,)
    directions: int = 1
    reads: int = 1
    multiple: int = 16
    rows_for_columns: bool = False
    releases: str = "2.11 to 2.20"
    signature: tuple[str, str] | None = None

    def scales_shape(self, rows: int, columns: int, *, by_columns: bool = False) -> tuple[int, ...]:
        """Return the shape of a matrix's scales, in whole blocks."""
        if self.block is None:
            return (1,)
        block = self.block[::-1] if by_columns and self.directions > 1 else self.block
        return -(-rows // block[0]), -(-columns // block[1])

    def payload_rows(self, rows: int, columns: int) -> int:
        """Return P; both directions have as many, since their sides are multiples of the block."""
        return rows + -(-self._bytes_of_scales(rows, columns) // columns)

    def packing_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes read and written to lay out a payload from values and scales."""
        copied = rows * columns + self._bytes_of_scales(rows, columns)
        return 2 * copied + (self.payload_rows(rows, columns) - rows) * columns

    def quantising_bytes(self, rows: int, columns: int, bytes_per_element: int) -> int:
        """Return the bytes read and written to quantise a matrix, and to lay out its payload."""
        if self.value_bytes == 0:
            return 0
        read = self.reads * rows * columns * bytes_per_element
        written = rows * columns + self._bytes_of_scales(rows, columns)
        return read + written + self.packing_bytes(rows, columns)

    def operand_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes read and written to quantise a token's value.

        One is written for products along rows, and one for products along columns.
        """
        return self.reads * bytes_per_element + 2 * self.value_bytes

    def _bytes_of_scales(self, rows: int, columns: int) -> int:
        return self.scale_bytes * math.prod(self.scales_shape(rows, columns))


_ROWS: Mapping[Precision, Quantisation] = {
    Precision.PARAMETERS: Quantisation(
        None, Part("", "", ()), Part("", "", ()), Cards((0, 0)), 0, 0, reads=0, multiple=1
    ),
    Precision.TENSORWISE: Quantisation(
        block=None,
        quantiser=Part("float8_tensor", "Float8CurrentScalingQuantizer", (*_EXACT, "device")),
        tensor=Part("float8_tensor", "Float8Tensor", ("data", "fp8_scale_inv", "fp8_dtype")),
        cards=Cards((8, 9)),
        reads=2,
        rows_for_columns=True,
        signature=("storage.float8_tensor_storage", "Float8TensorStorage"),
    ),
    # A square block is one in both directions.
    Precision.BLOCKWISE: Quantisation(
        block=(128, 128),
        quantiser=Part(
            "float8_blockwise_tensor", "Float8BlockQuantizer", (*_EXACT, "block_scaling_dim")
        ),
        tensor=Part(
            "float8_blockwise_tensor",
            "Float8BlockwiseQTensor",
            (*_DIRECTIONS, "fp8_dtype", "quantizer", "is_2D_scaled"),
        ),
        cards=Cards((9, 0), cuda=(12, 9)),
        tile=(1, 4),
    ),
    Precision.MXFP8: Quantisation(
        block=(1, 32),
        quantiser=Part("mxfp8_tensor", "MXFP8Quantizer", _QUANTISER),
        tensor=Part(
            "mxfp8_tensor",
            "MXFP8Tensor",
            (*_DIRECTIONS, "fp8_dtype", "quantizer", "with_gemm_swizzled_scales"),
        ),
        cards=Cards((10, 0), (12, 0)),
        scale_bytes=1,
        tile=(128, 4),
        directions=2,
        multiple=32,
        # Earlier ones cannot be told that scales are not swizzled.
        releases="2.12 to 2.20",
    ),
}

QUANTISED = tuple(precision for precision in Precision if precision.is_quantised)


def recipe_of(settings: Any) -> str:
    """Return the recipe of Megatron's TransformerConfig or arguments, or its default."""
    recipe = getattr(settings, "fp8_recipe", None) or MEGATRONS_RECIPE
    return str(getattr(recipe, "value", recipe))


def card_problem(precision: Precision, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Return why Transformer Engine computes no such products on a card; None if it does.

    `cuda` is the release that torch was built with, None where it is not known.
    """
    major, minor = map(int, (cuda or "99.0").split(".")[:2])
    fitting = [one for one in QUANTISED if one.row.cards.include(capability, (major, minor))]
    if precision in fitting:
        return None
    instead = f"give --fp8-recipe {' or '.join(fitting)}" if fitting else "leave out --fp8-format"
    return (
        f"--fp8-recipe {precision} with --fsep-allow-unproven fp8-experts: Transformer Engine "
        f"needs {precision.row.cards}, and this card has {dotted(capability)} with CUDA {cuda}; "
        f"{instead}"
    )


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
