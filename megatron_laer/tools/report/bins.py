"""Bins of steps, and numbers thinned out to the resolution of a screen.

Legend: T steps, L MoE layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megatron_laer.tools.report.metrics_recording import Float64
from megatron_laer.tools.report.recorded import RunData

# Maximum columns of a figure, and cells of a figure with one picture per layer.
MAX_BINS = 240
_MAX_CELLS = 80_000
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))

Bins = list[list[int]]


def bin_edges(number: int, most: int) -> list[int]:
    """Divide steps into at most `most` bins of equal length; the last may be shorter."""
    length = max(1, -(-number // most))
    return [*range(0, number, length), number]


def binned(values: Float64, edges: Sequence[int]) -> Float64:
    """Return the means of each bin along the first axis, without missing values."""
    is_there = np.isfinite(values)
    starts = np.array(edges[:-1])
    sums = np.add.reduceat(np.where(is_there, values, 0.0), starts, axis=0)
    numbers = np.add.reduceat(is_there.astype(np.float64), starts, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Float64 = sums / numbers
    return means


def bins_of(run: RunData, edges: Sequence[int]) -> Bins:
    """Return the first and last iteration of each bin."""
    numbers = run.iterations_T.tolist()
    return [[numbers[begin], numbers[end - 1]] for begin, end in itertools.pairwise(edges)]


def largest(values: Float64) -> float:
    """Return the largest finite value; 0 without any."""
    there = values[np.isfinite(values)]
    return float(there.max()) if there.size else 0.0


def in_unit(series: Mapping[str, Float64]) -> tuple[dict[str, Float64], str]:
    """Convert bytes to a unit that fits the largest value."""
    most = max(largest(values) for values in series.values())
    unit, size = next(((u, s) for u, s in _UNITS if most >= s), _UNITS[-1])
    return {name: values / size for name, values in series.items()}, unit


def text_of(value: float) -> str:
    """Return a number with four digits, or a dash."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def over_mean(tokens: npt.NDArray[np.int64]) -> Float64:
    mean = tokens.mean(axis=-1, keepdims=True)
    over: Float64 = np.where(mean > 0, tokens / np.maximum(mean, 1e-9), np.nan)
    return over


def edges_by_layer(run: RunData) -> list[int]:
    """Return the bins of a figure with one picture per layer."""
    cells = len(run.shape.layers) * run.shape.num_experts
    return bin_edges(len(run.steps_T), max(1, min(MAX_BINS, _MAX_CELLS // cells)))
