"""Names and units of all metrics, and where a run writes them; docs/metrics.md has their meanings.

`statistics` and `plugin/metrics_tracker` compute the logged ones, `telemetry/metrics_file` has the
format of the recorded ones.
"""

from __future__ import annotations

from typing import NamedTuple

# Percentiles over layers.
PERCENTILES = (50, 95, 99)


class Metric(NamedTuple):
    """Logged metric.

    It is the mean over layers of the field `of` of `statistics.LayerMetrics`; with `over`, the
    field `of` of `RankMetrics` over that one. Those without are computed from several. With
    `over_layers` its percentiles and its value for each layer are logged as well. `in_line`
    metrics are in the log line, not only in TensorBoard, W&B and recordings.
    """

    name: str
    unit: str = ""
    of: str = ""
    over: str = ""
    over_layers: bool = False
    in_line: bool = True


LOGGED = (
    Metric("fsep_load_imbalance", of="imbalance", over_layers=True),
    Metric("fsep_stock_load_imbalance", of="stock_imbalance", over_layers=True),
    Metric("fsep_optimality_gap", in_line=False),
    Metric("fsep_share_of_forced_balance"),
    Metric("fsep_predicted_layer_ms", "ms", "predicted_ms", in_line=False),
    Metric("fsep_layer_ms", "ms", "layer_ms", "layer_ranks"),
    Metric("fsep_fresh_layouts", of="fresh_layouts"),
    Metric("fsep_replicas", of="replicas", in_line=False),
    Metric("fsep_passes_without_replicas", of="without_replicas", in_line=False),
    Metric("fsep_weight_mb", "MB", "weight_bytes", "ranks", in_line=False),
    Metric("fsep_quota_ms", "ms", "decide_ms"),
    Metric("fsep_restore_exposed_ms", "ms", "restore_exposed_ms", "ranks"),
    Metric("fsep_reduce_exposed_ms", "ms", "reduce_exposed_ms", "ranks"),
    Metric("fsep_token_rows_intra_node", "", "intra_rows", "dispatches", in_line=False),
    Metric("fsep_token_rows_inter_node", "", "inter_rows", "dispatches", in_line=False),
    Metric("fsep_token_mb_intra_node", "MB", "intra_bytes", "dispatches", in_line=False),
    Metric("fsep_token_mb_inter_node", "MB", "inter_bytes", "dispatches", in_line=False),
    Metric("fsep_memory_headroom_gib", "GiB", in_line=False),
    Metric("fsep_plan_ms", "ms"),
    Metric("fsep_layout_version"),
    Metric("fsep_late_plans"),
    Metric("fsep_plan_failures"),
    Metric("fsep_verified"),
    Metric("fsep_announcement_misses"),
)

# With the percentiles, as a step's are recorded.
LOGGED_NAMES = tuple(
    name
    for metric in LOGGED
    for name in (metric.name, *(f"{metric.name}_p{p}" for p in PERCENTILES if metric.over_layers))
)


def is_in_line(name: str) -> bool:
    """Return whether a logged value is in the log line too.

    The line is kept below 1,024 bytes: Slurm forwards output in pieces of that size, and another
    rank's may come between two pieces.
    """
    return name not in _NOT_IN_LINE


_NOT_IN_LINE = {metric.name for metric in LOGGED if not metric.in_line} | {
    f"{metric.name}_p99" for metric in LOGGED if metric.over_layers
}

# Values of a step on the planner rank, which also records the logged ones, of its group and step.
RECORDED_OF_STEPS = (
    *("step", "step_ms", "dispatch_ms", "experts_ms", "combine_ms", "restore_wait_ms"),
    *("reduce_wait_ms", "decide_ms", "plan_ms", "version", "late_plans", "plan_failures"),
    *("used_bytes", "headroom_bytes", "weight_bytes"),
)

# Values of a layer in a step.
RECORDED_OF_LAYERS = (
    *("passes", "fresh", "changed_slots", "largest_tokens", "least_tokens", "max_over_mean"),
    *("stock_max_over_mean", "decide_ms", "gain_ms", "cost_ms", "taken_cost_ms"),
    *("change_ms", "predicted_ms", "stock_ms", "balanced_ms", "bound_ms", "layer_ms"),
    *("replicas", "without_replicas"),
)
