"""FSEP's metrics tracker replaces Megatron's, through Megatron's own setter."""

from __future__ import annotations

from argparse import Namespace


def install_metrics(args: Namespace) -> None:
    """Add the metrics of FSEP to those that Megatron logs."""
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

    tracker = FSEPMetricsTracker(args.log_interval, args.num_layers, args.mtp_num_layers or 0)
    set_moe_metrics_tracker(tracker)


def remove_metrics() -> None:
    """Leave Megatron to make a tracker of its own."""
    from megatron.core.transformer.moe import moe_logging

    from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

    if isinstance(moe_logging.get_moe_metrics_tracker(), FSEPMetricsTracker):
        moe_logging.destroy_moe_metrics_tracker()
