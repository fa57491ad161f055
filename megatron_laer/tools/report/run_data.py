"""`RunData` holds what a report knows of a run, whether it was recorded or replayed.

Legend: T steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.telemetry.metrics_file import Shape

# Records, whose counts are copied to be added up.
_AT_ONCE = 1024

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunData:
    """Holds a run, layer by layer and step by step; NaN stands for what was not there.

    Attributes:
        name: as the user gave it.
        is_measured: whether times were measured in the run; else all are predicted.
        steps_T: numbers of the steps.
        imbalance_TL, stock_TL: tokens of the busiest rank over the mean, as it was, or would have
            been, and under stock's placement.
        layer_ms_TL: a layer's time in a step over all its passes: measured, or predicted.
        of_steps: measured times of a step and its state, by the recording's names; may be empty.
        of_layers: [T, L] by the recording's names.
        metrics: [T] by the names under which they are logged.
        rank_tokens_TLN, stock_rank_tokens_TLN: tokens that each rank computed, and would have.
        experts_TLE: tokens for each expert; None without a trace.
        layouts: planned layouts, by the step from which they held.
        loss: [step from 1, loss] of Megatron's log.
        settings: how the run began, and what it was reckoned with.
        notes: what a reader must know of these data.
    """

    name: str
    shape: Shape
    is_measured: bool
    steps_T: Int64
    imbalance_TL: Float64
    stock_TL: Float64
    layer_ms_TL: Float64
    of_steps: Mapping[str, Float64]
    of_layers: Mapping[str, Float64]
    metrics: Mapping[str, Float64]
    rank_tokens_TLN: Int64
    stock_rank_tokens_TLN: Int64 | None
    experts_TLE: Int64 | None
    layouts: Sequence[tuple[int, Sequence[ExpertLayout]]] = ()
    loss: Sequence[tuple[int, float]] = ()
    settings: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def expert_tokens_TLE(
    steps_R: Int64, layer_R: Int64, counts_RNE: npt.NDArray[np.int32], steps_T: Int64, layers: int
) -> Int64:
    """Add up the tokens for each expert by step and layer; steps that are not asked for are left.

    Args:
        steps_R, layer_R, counts_RNE: of a trace's records.
        steps_T: the steps, in order.
    """
    at_R = np.searchsorted(steps_T, steps_R)
    is_known_R = (at_R < len(steps_T)) & (steps_T[np.minimum(at_R, len(steps_T) - 1)] == steps_R)
    experts_TLE = np.zeros((len(steps_T), layers, counts_RNE.shape[2]), dtype=np.int64)
    chosen = np.flatnonzero(is_known_R)
    for begin in range(0, len(chosen), _AT_ONCE):
        part = chosen[begin : begin + _AT_ONCE]
        sums_RE = counts_RNE[part].sum(axis=1, dtype=np.int64)
        np.add.at(experts_TLE, (at_R[part], layer_R[part]), sums_RE)
    return experts_TLE
