"""FSEP's metrics for Megatron's log line, TensorBoard and W&B.

Megatron's MoE metrics tracker is replaceable by design (`set_moe_metrics_tracker`), so nothing is
patched.
"""

from __future__ import annotations

import logging
from dataclasses import astuple, fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from megatron_laer.planner.guard import in_words
from megatron_laer.planner.outcome import price
from megatron_laer.runtime.build import current_device
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.session import current_coordinator
from megatron_laer.telemetry.metrics import is_in_line
from megatron_laer.telemetry.rank_memory import memory_use
from megatron_laer.telemetry.statistics import LayerMetrics, LayerPasses, RankMetrics, named

logger = logging.getLogger(__name__)

_GIB = 2**30


class FSEPMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, extended by balance and planning.

    A report gathers over the world, so there is one per `interval` steps only.
    """

    def __init__(self, interval: int, decoder_layers: int, mtp_layers: int) -> None:
        super().__init__()
        self._interval = interval
        self._layers = (decoder_layers, mtp_layers)

    def report(self, *args: Any, **kwargs: Any) -> str:
        """Write and return Megatron's report and FSEP's. Collective over the world."""
        line: str = super().report(*args, **kwargs)
        iteration = kwargs["iteration"]
        if iteration % self._interval:
            return line
        scalars, per_layer = collect(current_coordinator(), *self._layers)
        by_name = {f"moe/{name}": value for name, value in per_layer.items()} | scalars
        writer, wandb_writer = kwargs.get("writer"), kwargs.get("wandb_writer")
        for name, value in by_name.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({name: value}, iteration)
        shown = ((name, value) for name, value in scalars.items() if is_in_line(name))
        return line + "".join(f" {name}: {value:.3f} |" for name, value in shown)


def collect(
    coordinator: Coordinator | None, decoder_layers: int, mtp_layers: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Collect metrics since the last call, of the model and by layer. Collective over the world.

    A pipeline stage without MoE layers, hence without a coordinator, takes part. Values of planning
    are those of this rank's group.
    """
    layers = [LayerMetrics()] * (decoder_layers + mtp_layers)
    rank = RankMetrics()
    if coordinator is not None:
        layer_ms = coordinator.recorder.take_layer_ms()
        sent = np.sum([layer.statistics.take_sent() for layer in coordinator.layers], axis=0)
        rank = RankMetrics(*coordinator.take_exchanged(), 1.0, *sent.tolist())
        if layer_ms is not None:
            rank = replace(rank, layer_ms=layer_ms, layer_ranks=1.0)
        newest = {}
        for layer in coordinator.layers:
            outcomes = layer.statistics.take_outcomes()
            if not outcomes:
                continue
            newest[layer.name] = outcomes[-1].decision
            # Hybrid models number MTP layers past `mtp_layers`: these add to the last row.
            row = layer.number - 1 + (decoder_layers if layer.is_mtp else 0)
            row = min(row, len(layers) - 1)
            passes = LayerPasses.of(coordinator.geometry.num_ranks, outcomes)
            guard = coordinator.layouts.guard_of(layer.index, coordinator.guard)
            # For one microbatch only: a price takes as long as a decision.
            layers[row] += LayerMetrics.of(passes, price(guard, outcomes[-1]))
        if newest and logger.isEnabledFor(logging.INFO):
            logger.info("FSEP: %s", in_words(newest))
    layers, rank = _sum_over_ranks(layers, rank)
    scalars, per_layer = named(layers, rank)
    scalars["fsep_memory_headroom_gib"] = _least_headroom_bytes() / _GIB
    if coordinator is not None:
        status = coordinator.layouts.status
        scalars["fsep_plan_ms"] = status.plan_us / 1e3
        scalars["fsep_layout_version"] = float(coordinator.layouts.version)
        scalars["fsep_late_plans"] = float(status.late_plans)
        scalars["fsep_plan_failures"] = float(status.failures)
        scalars["fsep_verified"] = float(coordinator.verifier.checks)
        if coordinator.pass_layouts.misses is not None:
            scalars["fsep_announcement_misses"] = float(coordinator.pass_layouts.misses)
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


def _least_headroom_bytes() -> float:
    """Return the least headroom over all ranks of the world. Collective."""
    device = current_device()
    least = torch.tensor(memory_use(device).headroom_bytes, dtype=torch.float64).to(device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least.item())
