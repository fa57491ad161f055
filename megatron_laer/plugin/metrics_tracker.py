"""FSEP's metrics in Megatron's log line, TensorBoard and W&B.

Megatron asks its MoE metrics tracker for a report once per step and puts what it returns into the
log line; the tracker is replaceable by design (`set_moe_metrics_tracker`), so nothing is patched.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from megatron_laer.planner.balance import balance
from megatron_laer.runtime.coordinator import Coordinator, current_coordinator
from megatron_laer.session import current_device

logger = logging.getLogger(__name__)

PERCENTILES = (50, 95)


class FSEPMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, which also reports balance and planning.

    Args:
        interval: steps between two reports; a report gathers over the world, so not every step.
        decoder_layers, mtp_layers: of the whole model.
    """

    def __init__(self, interval: int, decoder_layers: int, mtp_layers: int) -> None:
        super().__init__()
        self._interval = interval
        self._layers = (decoder_layers, mtp_layers)

    def report(self, *args: Any, **kwargs: Any) -> str:
        """Megatron's report, followed by FSEP's."""
        line = super().report(*args, **kwargs)
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


def collect(
    coordinator: Coordinator | None, decoder_layers: int, mtp_layers: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics since the last call: over the model, and per layer. Collective over the world.

    A pipeline stage without MoE layers, hence without a coordinator, takes part.

    Returns:
        Scalars and per-layer values by name. Values of planning are those of this rank's group.
    """
    # Columns: FSEP, stock, share of fresh layouts, milliseconds to decide, and how many groups have
    # a value; rows of other stages stay zero. The last row: exposed times of restores and of
    # gradients, per rank.
    values_L5 = torch.zeros(decoder_layers + mtp_layers + 1, 5, dtype=torch.float64)
    if coordinator is not None:
        values_L5[-1] = torch.tensor([*coordinator.take_exposed_ms(), 0.0, 0.0, 1.0])
    for layer in [] if coordinator is None else coordinator.layers:
        history = list(layer.history)
        layer.history.clear()
        measured = balance(decision.quotas for decision, _ in history)
        if measured is not None:
            logger.info("FSEP %s: %s", layer.name, history[-1][0].reason)
            fresh, solve_s = np.mean([(d.replanned, seconds) for d, seconds in history], axis=0)
            row = layer.number - 1 + (decoder_layers if layer.is_mtp else 0)
            row = min(row, len(values_L5) - 2)
            values_L5[row] += torch.tensor([measured.fsep, measured.stock, fresh, solve_s * 1e3, 1])
    values_L5 = values_L5.to(current_device())
    dist.all_reduce(values_L5)
    *values, exposed_5 = values_L5.cpu()
    values_L5 = torch.stack(values)
    has_value = values_L5[:, 4] > 0
    means_L4 = values_L5[has_value, :4] / values_L5[has_value, 4:]
    fsep, stock, fresh_layouts, decide_ms = means_L4.unbind(1)
    layers = (torch.nonzero(has_value).flatten()).tolist()
    per_layer: dict[str, float] = {}
    scalars: dict[str, float] = {}
    for name, values in (("fsep_load_imbalance", fsep), ("fsep_stock_load_imbalance", stock)):
        for layer_index, value in zip(layers, values.tolist(), strict=True):
            per_layer[f"{name}_layer_{layer_index}"] = value
        if values.numel():
            scalars[name] = values.mean().item()
            for percentile in PERCENTILES:
                scalars[f"{name}_p{percentile}"] = values.quantile(percentile / 100).item()
    if fresh_layouts.numel():
        scalars["fsep_fresh_layouts"] = fresh_layouts.mean().item()
        scalars["fsep_quota_ms"] = decide_ms.mean().item()
    if exposed_5[4] > 0:
        scalars["fsep_restore_exposed_ms"] = (exposed_5[0] / exposed_5[4]).item()
        scalars["fsep_reduce_exposed_ms"] = (exposed_5[1] / exposed_5[4]).item()
    if coordinator is not None:
        status = coordinator.planner_status
        scalars["fsep_plan_ms"] = status.plan_us / 1e3
        scalars["fsep_layout_version"] = float(coordinator.version)
        scalars["fsep_late_plans"] = float(status.late_plans)
        scalars["fsep_plan_failures"] = float(status.failures)
    return scalars, per_layer
