"""FSEP's metrics are collected here for Megatron's log line, TensorBoard and W&B.

Megatron asks its MoE metrics tracker for a report once per step and puts what it returns into the
log line; the tracker is replaceable by design (`set_moe_metrics_tracker`), so nothing is patched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from megatron_laer.planner.balance import balance
from megatron_laer.runtime.build import current_device
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.runtime.layer_state import Sample
from megatron_laer.session import current_coordinator

logger = logging.getLogger(__name__)

PERCENTILES = (50, 95)


class FSEPMetricsTracker(MoEMetricsTracker):
    """Extends Megatron's tracker: it also reports balance and planning.

    Args:
        interval: steps between two reports; a report gathers over the world, so not every step.
        decoder_layers, mtp_layers: of the whole model.
    """

    def __init__(self, interval: int, decoder_layers: int, mtp_layers: int) -> None:
        super().__init__()
        self._interval = interval
        self._layers = (decoder_layers, mtp_layers)

    def report(self, *args: Any, **kwargs: Any) -> str:
        """Return Megatron's report, followed by FSEP's."""
        line: str = super().report(*args, **kwargs)
        iteration = kwargs["iteration"]
        if iteration % self._interval:
            return line
        scalars, per_layer = collect(current_coordinator(), *self._layers)
        named = {f"moe/{name}": value for name, value in per_layer.items()} | scalars
        writer, wandb_writer = kwargs.get("writer"), kwargs.get("wandb_writer")
        for name, value in named.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({name: value}, iteration)
        return line + "".join(f" {name}: {value:.3f} |" for name, value in scalars.items())


@dataclass(frozen=True)
class LayerMetrics:
    """Holds sums over FSEP groups of what each measured of one layer since the last report.

    A layer's mean is the sum divided by `groups`. To add a metric of layers, add a field here, fill
    it in `of`, and name it in `_named`.

    Attributes:
        imbalance: max/mean tokens per rank, mean over microbatches.
        stock_imbalance: what it would be under stock Megatron's placement.
        fresh_layouts: share of microbatches with a layout of their own.
        decide_ms: the host's milliseconds to decide on a microbatch.
        groups: FSEP groups that measured the layer.
    """

    imbalance: float = 0.0
    stock_imbalance: float = 0.0
    fresh_layouts: float = 0.0
    decide_ms: float = 0.0
    groups: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> LayerMetrics:
        """Measure one group; all is zero without samples."""
        measured = balance(sample.decision.quotas for sample in samples)
        if measured is None:
            return cls()
        return cls(
            imbalance=measured.fsep,
            stock_imbalance=measured.stock,
            fresh_layouts=float(np.mean([sample.decision.replanned for sample in samples])),
            decide_ms=float(np.mean([sample.decide_s for sample in samples])) * 1e3,
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
    """

    restore_exposed_ms: float = 0.0
    reduce_exposed_ms: float = 0.0
    ranks: float = 0.0
    intra_rows: float = 0.0
    inter_rows: float = 0.0
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    dispatches: float = 0.0


def collect(
    coordinator: Coordinator | None, decoder_layers: int, mtp_layers: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Collect metrics since the last call, of the model and by layer. Collective over the world.

    A pipeline stage without MoE layers, hence without a coordinator, takes part.

    Returns:
        Scalars and per-layer values by name. Values of planning are those of this rank's group.
    """
    layers = [LayerMetrics()] * (decoder_layers + mtp_layers)
    rank = RankMetrics()
    if coordinator is not None:
        sent = np.sum([astuple(layer.take_sent()) for layer in coordinator.layers], axis=0)
        rank = RankMetrics(*coordinator.take_exposed_ms(), 1.0, *sent.tolist())
        for layer in coordinator.layers:
            samples = layer.take_samples()
            if samples:
                logger.info("FSEP %s: %s", layer.name, samples[-1].decision.reason)
            # Hybrid models number MTP layers past `mtp_layers`: these add to the last row.
            row = layer.number - 1 + (decoder_layers if layer.is_mtp else 0)
            row = min(row, len(layers) - 1)
            layers[row] += LayerMetrics.of(samples)
    layers, rank = _sum_over_ranks(layers, rank)
    scalars, per_layer = _named(layers, rank)
    if coordinator is not None:
        status = coordinator.layouts.status
        scalars["fsep_plan_ms"] = status.plan_us / 1e3
        scalars["fsep_layout_version"] = float(coordinator.layouts.version)
        scalars["fsep_late_plans"] = float(status.late_plans)
        scalars["fsep_plan_failures"] = float(status.failures)
        if coordinator.announced is not None:
            scalars["fsep_announcement_misses"] = float(coordinator.announced.misses)
    return scalars, per_layer


def _sum_over_ranks(
    layers: list[LayerMetrics], rank: RankMetrics
) -> tuple[list[LayerMetrics], RankMetrics]:
    values = [value for layer in layers for value in astuple(layer)] + [*astuple(rank)]
    summed = torch.tensor(values, dtype=torch.float64).to(current_device())
    dist.all_reduce(summed)
    width = len(fields(LayerMetrics))
    *by_layer, of_ranks = summed.cpu().split([width] * len(layers) + [len(fields(RankMetrics))])
    return [LayerMetrics(*row.tolist()) for row in by_layer], RankMetrics(*of_ranks.tolist())


def _named(
    layers: Sequence[LayerMetrics], rank: RankMetrics
) -> tuple[dict[str, float], dict[str, float]]:
    """Name scalars and per-layer values as Megatron logs them."""
    means = {index: layer.mean() for index, layer in enumerate(layers) if layer.groups}
    scalars: dict[str, float] = {}
    per_layer: dict[str, float] = {}
    for name, by_layer in (
        ("fsep_load_imbalance", {at: mean.imbalance for at, mean in means.items()}),
        ("fsep_stock_load_imbalance", {at: mean.stock_imbalance for at, mean in means.items()}),
    ):
        per_layer |= {f"{name}_layer_{at}": value for at, value in by_layer.items()}
        if by_layer:
            values = np.array([*by_layer.values()])
            scalars[name] = float(values.mean())
            for percentile in PERCENTILES:
                scalars[f"{name}_p{percentile}"] = float(np.percentile(values, percentile))
    if means:
        scalars["fsep_fresh_layouts"] = float(np.mean([m.fresh_layouts for m in means.values()]))
        scalars["fsep_quota_ms"] = float(np.mean([m.decide_ms for m in means.values()]))
    if rank.ranks:
        scalars["fsep_restore_exposed_ms"] = rank.restore_exposed_ms / rank.ranks
        scalars["fsep_reduce_exposed_ms"] = rank.reduce_exposed_ms / rank.ranks
    if rank.dispatches:
        scalars["fsep_token_rows_intra_node"] = rank.intra_rows / rank.dispatches
        scalars["fsep_token_rows_inter_node"] = rank.inter_rows / rank.dispatches
        scalars["fsep_token_mb_intra_node"] = rank.intra_bytes / rank.dispatches / 1e6
        scalars["fsep_token_mb_inter_node"] = rank.inter_bytes / rank.dispatches / 1e6
    return scalars, per_layer
