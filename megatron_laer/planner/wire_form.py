"""Form of an expert in exchanges of weights or gradients: matrices, bytes, passes over memory.

In fp8, home experts travel as payloads (`layer/experts/fp8/payload.py`; tests compare the sizes).

Legend: R rows of a matrix, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_laer.choices import Fp8Recipe, Recompute

# Sides of the blocks that share a scale of a weight, and multiple of a row's scales of square ones.
_BLOCK, _MX_BLOCK, _SCALES = 128, 32, 4
_SCALE_BYTES = 4  # float32


@dataclass(frozen=True)
class WireForm:
    """Form of an expert in one kind of exchange.

    Attributes:
        matrices: (rows, columns) of each matrix or of its payload.
        quantising_passes: passes of the sender over these bytes in memory, before it packs them.
        directions: forms of as many bytes that an expert has; of two, each serves one direction.
    """

    matrices: tuple[tuple[int, int], ...]
    bytes_per_element: int
    quantising_passes: float = 0.0
    directions: int = 1

    @property
    def expert_bytes(self) -> int:
        return self.bytes_per_element * sum(rows * columns for rows, columns in self.matrices)


@lru_cache(maxsize=64)
def payload_form(
    recipe: Fp8Recipe, matrices: tuple[tuple[int, int], ...], bytes_per_element: int
) -> WireForm:
    """Return the form of quantised matrices, whose elements have `bytes_per_element` at home.

    The sender quantises each expert once. That it goes to several replicas is not counted, so
    quantising takes at most this time.
    """
    payloads = tuple((payload_rows(recipe, *matrix), matrix[1]) for matrix in matrices)
    form = WireForm(payloads, 1, directions=2 if recipe == Fp8Recipe.MXFP8 else 1)
    moved = sum(_quantising_bytes(recipe, *matrix, bytes_per_element) for matrix in matrices)
    return replace(form, quantising_passes=moved / form.expert_bytes)


def backward_restores(directions: int, recompute: Recompute) -> int:
    """Return the restores of a layer's backward: forward's re-run may need a form of its own."""
    return 1 if recompute == Recompute.NONE else directions


def payload_rows(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Return the rows of a matrix's payload: a byte per element, then scales in whole rows."""
    return rows + -(-_scale_bytes(recipe, rows, columns) // columns)


def packing_bytes(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Return the bytes that `PayloadForm.pack` reads and writes for values and scales."""
    copied = rows * columns + _scale_bytes(recipe, rows, columns)
    return 2 * copied + (payload_rows(recipe, rows, columns) - rows) * columns


def quantising_reads(recipe: Fp8Recipe) -> int:
    """Return how often a tensor is read: current scaling needs its largest value first."""
    return 2 if recipe == Fp8Recipe.TENSORWISE else 1


def _quantising_bytes(recipe: Fp8Recipe, rows: int, columns: int, bytes_per_element: int) -> int:
    """Return the bytes read and written to quantise a matrix, and to lay out its payload."""
    read = quantising_reads(recipe) * rows * columns * bytes_per_element
    written = rows * columns + _scale_bytes(recipe, rows, columns)
    return read + written + packing_bytes(recipe, rows, columns)


def _scale_bytes(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Return the bytes of a matrix's scales.

    In mxfp8 both sides are multiples of its block, so that both directions have as many.
    """
    return {
        Fp8Recipe.TENSORWISE: _SCALE_BYTES,
        Fp8Recipe.BLOCKWISE: _SCALE_BYTES
        * -(-rows // _BLOCK)
        * (-(-columns // (_BLOCK * _SCALES)) * _SCALES),
        Fp8Recipe.MXFP8: rows * -(-columns // _MX_BLOCK),
    }[recipe]
