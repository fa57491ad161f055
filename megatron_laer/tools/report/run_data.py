"""Data of a report on a run.

Legend: T steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.telemetry.metrics_file import Shape

# Number of records whose counts are copied at a time.
_AT_ONCE = 1024

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunData:
    """Data of a run, by layer and step; NaN stands for missing values.

    `imbalance_TL` and `stock_TL` are tokens of the busiest rank over the mean, with FSEP and under
    stock's placement. `layer_ms_TL` is the time over all passes of a step. `of_steps`, `of_layers`
    and `metrics` are by recorded or logged names. `experts_TLE` is None without a trace. `layouts`
    are planned ones by their first step, `loss` by iteration from 1. `resumed` are the first steps
    of later runs that went on with the recording.
    """

    name: str
    shape: Shape
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
    resumed: Sequence[int] = ()
    recorded: str = ""
    settings: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    sharding: Sharding = Sharding.ROWS


def expert_tokens_TLE(
    steps_R: Int64, layer_R: Int64, counts_RNE: npt.NDArray[np.int32], steps_T: Int64, layers: int
) -> Int64:
    """Add up a trace's tokens of each expert by step and layer, for the ordered steps `steps_T`."""
    at_R = np.searchsorted(steps_T, steps_R)
    is_known_R = (at_R < len(steps_T)) & (steps_T[np.minimum(at_R, len(steps_T) - 1)] == steps_R)
    experts_TLE = np.zeros((len(steps_T), layers, counts_RNE.shape[2]), dtype=np.int64)
    chosen = np.flatnonzero(is_known_R)
    for begin in range(0, len(chosen), _AT_ONCE):
        part = chosen[begin : begin + _AT_ONCE]
        sums_RE = counts_RNE[part].sum(axis=1, dtype=np.int64)
        np.add.at(experts_TLE, (at_R[part], layer_R[part]), sums_RE)
    return experts_TLE


def shape_settings(shape: Shape) -> list[tuple[str, str]]:
    return [
        ("ranks N", str(shape.num_ranks)),
        ("ranks per node G", str(shape.node_size)),
        ("experts E", str(shape.num_experts)),
        ("slots per rank C", str(shape.capacity)),
        ("MoE layers", str(len(shape.layers))),
    ]
