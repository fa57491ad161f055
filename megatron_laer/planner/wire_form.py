"""Form of an expert in exchanges of weights or gradients: matrices, bytes, passes over memory.

Quantised experts travel as payloads (`precision.py`).

Legend: R rows of a matrix, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_laer.choices import Recompute
from megatron_laer.precision import Precision


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
def weights_form(
    precision: Precision, matrices: tuple[tuple[int, int], ...], bytes_per_element: int
) -> WireForm:
    """Return the form of matrices, whose elements have `bytes_per_element` at home.

    The sender quantises each expert once. That it goes to several replicas is not counted, so
    quantising takes at most this time.
    """
    row = precision.row
    payloads = tuple((row.payload_rows(*matrix), matrix[1]) for matrix in matrices)
    form = WireForm(payloads, row.value_bytes or bytes_per_element, directions=row.directions)
    moved = sum(row.quantising_bytes(*matrix, bytes_per_element) for matrix in matrices)
    return replace(form, quantising_passes=moved / form.expert_bytes)


def backward_restores(directions: int, recompute: Recompute) -> int:
    """Return the restores of a layer's backward: forward's re-run may need a form of its own."""
    return 1 if recompute == Recompute.NONE else directions
