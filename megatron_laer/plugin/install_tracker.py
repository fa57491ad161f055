"""Installs FSEP's metrics tracker through Megatron's own setter."""

from __future__ import annotations

from megatron_laer.plugin.patching import forget, note

_MODULE = "megatron.core.transformer.moe.moe_logging"


def install_metrics(interval: int, decoder_layers: int, mtp_layers: int) -> None:
    """Add FSEP's metrics to those that Megatron logs: see `FSEPMetricsTracker`."""
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

    set_moe_metrics_tracker(FSEPMetricsTracker(interval, decoder_layers, mtp_layers))
    note(f"{_MODULE}, its tracker", "reports FSEP's metrics too")


def remove_metrics() -> None:
    """Remove FSEP's tracker; Megatron then makes one of its own."""
    from megatron.core.transformer.moe import moe_logging

    from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

    if isinstance(moe_logging.get_moe_metrics_tracker(), FSEPMetricsTracker):
        moe_logging.destroy_moe_metrics_tracker()
    forget(f"{_MODULE}, its tracker")
