"""The metrics of layers and ranks are worked out and named here; who writes them is elsewhere.

`plugin/metrics_tracker` adds them up over the world for Megatron's writers, and the planner rank
records its group's (`planning/metrics_recorder`). What each name means is told in
`telemetry/metrics`, from which the table in the docs is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from megatron_laer.planner.balance import balance
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.prediction import predict
from megatron_laer.runtime.layer_state import Sample
from megatron_laer.telemetry.metrics import PERCENTILES


@dataclass(frozen=True)
class LayerMetrics:
    """Holds sums over FSEP groups of what each measured of one layer since the last report.

    A layer's mean is the sum divided by `groups`. To add a metric of layers, add a field here, fill
    it in `of`, name it in `named`, and describe it in `telemetry/metrics`.

    Attributes:
        imbalance: max/mean tokens per rank, mean over microbatches.
        stock_imbalance: what it would be under stock Megatron's placement.
        fresh_layouts: share of microbatches with a layout of their own.
        decide_ms: the host's milliseconds to decide on a microbatch.
        predicted_ms, balanced_ms, bound_ms: of the newest microbatch: see `Prediction`.
        groups: FSEP groups that measured the layer.
    """

    imbalance: float = 0.0
    stock_imbalance: float = 0.0
    fresh_layouts: float = 0.0
    decide_ms: float = 0.0
    predicted_ms: float = 0.0
    balanced_ms: float = 0.0
    bound_ms: float = 0.0
    groups: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[Sample], guard: Guard) -> LayerMetrics:
        """Measure one group; all is zero without samples."""
        measured = balance(sample.decision.quotas for sample in samples)
        if measured is None:
            return cls()
        # Of one microbatch: a prediction takes as long as a decision.
        predicted = predict(guard, samples[-1].decision)
        return cls(
            imbalance=measured.fsep,
            stock_imbalance=measured.stock,
            fresh_layouts=float(np.mean([sample.decision.replanned for sample in samples])),
            decide_ms=float(np.mean([sample.decide_s for sample in samples])) * 1e3,
            predicted_ms=predicted.layer_s * 1e3,
            balanced_ms=predicted.balanced_s * 1e3,
            bound_ms=predicted.bound_s * 1e3,
            groups=1.0,
        )

    def __add__(self, other: LayerMetrics) -> LayerMetrics:
        """Return the sum over the groups of both."""
        return LayerMetrics(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def mean(self) -> LayerMetrics:
        """Return the mean over groups."""
        return LayerMetrics(*(value / self.groups for value in astuple(self)))


@dataclass(frozen=True)
class RankMetrics:
    """Holds sums over ranks of what each rank measured.

    Attributes:
        restore_exposed_ms, reduce_exposed_ms: what the compute waited for in a step.
        ranks: those that have MoE layers.
        intra_rows, inter_rows, intra_bytes, inter_bytes, dispatches: as in `SentRows`.
        layer_ms, layer_ranks: measured time of a layer and microbatch, and how many ranks did.
    """

    restore_exposed_ms: float = 0.0
    reduce_exposed_ms: float = 0.0
    ranks: float = 0.0
    intra_rows: float = 0.0
    inter_rows: float = 0.0
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    dispatches: float = 0.0
    layer_ms: float = 0.0
    layer_ranks: float = 0.0


def named(
    layers: Sequence[LayerMetrics], rank: RankMetrics
) -> tuple[dict[str, float], dict[str, float]]:
    """Name scalars and per-layer values as Megatron logs them.

    Args:
        layers: by row of the whole model; one without groups has no MoE layer.
    """
    means = {index: layer.mean() for index, layer in enumerate(layers) if layer.groups}
    scalars: dict[str, float] = {}
    per_layer: dict[str, float] = {}
    for name, by_layer in (
        ("fsep_load_imbalance", {at: mean.imbalance for at, mean in means.items()}),
        ("fsep_stock_load_imbalance", {at: mean.stock_imbalance for at, mean in means.items()}),
    ):
        per_layer |= {f"{name}_layer_{at}": value for at, value in by_layer.items()}
        scalars |= _over_layers(name, by_layer)
    if means:
        scalars["fsep_fresh_layouts"] = float(np.mean([m.fresh_layouts for m in means.values()]))
        scalars["fsep_quota_ms"] = float(np.mean([m.decide_ms for m in means.values()]))
        predicted_ms = sum(mean.predicted_ms for mean in means.values())
        bound_ms = sum(mean.bound_ms for mean in means.values())
        balanced_ms = sum(mean.balanced_ms for mean in means.values())
        scalars["fsep_predicted_layer_ms"] = predicted_ms / len(means)
        # Without any token, nothing takes any time.
        scalars["fsep_optimality_gap"] = predicted_ms / bound_ms - 1 if bound_ms else 0.0
        scalars["fsep_share_of_forced_balance"] = (
            balanced_ms / predicted_ms if predicted_ms else 1.0
        )
    if rank.ranks:
        scalars["fsep_restore_exposed_ms"] = rank.restore_exposed_ms / rank.ranks
        scalars["fsep_reduce_exposed_ms"] = rank.reduce_exposed_ms / rank.ranks
    if rank.dispatches:
        scalars["fsep_token_rows_intra_node"] = rank.intra_rows / rank.dispatches
        scalars["fsep_token_rows_inter_node"] = rank.inter_rows / rank.dispatches
        scalars["fsep_token_mb_intra_node"] = rank.intra_bytes / rank.dispatches / 1e6
        scalars["fsep_token_mb_inter_node"] = rank.inter_bytes / rank.dispatches / 1e6
    if rank.layer_ranks:
        scalars["fsep_layer_ms"] = rank.layer_ms / rank.layer_ranks
    return scalars, per_layer


def _over_layers(name: str, by_layer: Mapping[int, float]) -> dict[str, float]:
    """Return the mean over layers, and percentiles."""
    if not by_layer:
        return {}
    values = np.array([*by_layer.values()])
    return {name: float(values.mean())} | {
        f"{name}_p{percentile}": float(np.percentile(values, percentile))
        for percentile in PERCENTILES
    }
