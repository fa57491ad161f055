"""Names, units and meanings of all metrics, and where a run writes them.

`statistics` and `plugin/metrics_tracker` compute the logged ones, `telemetry/metrics_file` has the
format of the recorded ones. `docs/metrics.md` is generated from this file.
"""

from __future__ import annotations

from dataclasses import dataclass

# Percentiles over layers.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Attributes:
        unit: "1" for a number without any.
        over_layers: whether its percentiles and its value for each layer are logged as well.
        when: condition under which it exists, if any.
        in_line: whether it is in the log line, not only in TensorBoard, W&B and recordings.
    """

    name: str
    unit: str
    meaning: str
    over_layers: bool = False
    when: str = ""
    in_line: bool = True


LOGGED = (
    Metric(
        "fsep_load_imbalance",
        "1",
        "tokens of the busiest rank over the mean of ranks, as it was: 1 is perfect balance, N the "
        "worst; mean over layers, of each the mean over the newest microbatches (at most 32)",
        over_layers=True,
    ),
    Metric(
        "fsep_stock_load_imbalance",
        "1",
        "the same for the same routing under stock's placement",
        over_layers=True,
    ),
    Metric(
        "fsep_optimality_gap",
        "1",
        "predicted time of the MoE layers over the time that no layout of C slots and no split "
        "gets below, less 1; of each layer's newest microbatch",
        in_line=False,
    ),
    Metric(
        "fsep_share_of_forced_balance",
        "1",
        "predicted time of stock's MoE layers with forced balance over the predicted time as it "
        "was; of each layer's newest microbatch; above 1 where tokens travel less",
    ),
    Metric(
        "fsep_predicted_layer_ms",
        "ms",
        "predicted time of an MoE layer and microbatch, forward and backward, from dispatch to "
        "combine; mean over layers, of each the newest microbatch",
        in_line=False,
    ),
    Metric(
        "fsep_layer_ms",
        "ms",
        "the same as measured, waits for restores included; mean over layers and microbatches of "
        "the last step that the device has passed, and over the planner ranks",
        when="`--fsep-record-metrics`",
    ),
    Metric(
        "fsep_fresh_layouts",
        "1",
        "share of microbatches that got a layout of their own; mean over layers",
    ),
    Metric(
        "fsep_replicas",
        "1",
        "slots in use per rank, without each expert's first; mean over layers and microbatches",
        in_line=False,
    ),
    Metric(
        "fsep_passes_without_replicas",
        "1",
        "share of microbatches whose layout has each expert once; mean over layers",
        in_line=False,
    ),
    Metric(
        "fsep_quota_ms",
        "ms",
        "the host's time once the router has run, for the guard and the split, per layer and "
        "microbatch",
    ),
    Metric(
        "fsep_restore_exposed_ms",
        "ms",
        "what compute waited for restores, per step; mean over the ranks that have MoE layers",
    ),
    Metric(
        "fsep_reduce_exposed_ms",
        "ms",
        "what compute waited for gradient exchanges, per step; mean over the ranks that have MoE "
        "layers",
    ),
    Metric(
        "fsep_token_rows_intra_node",
        "1",
        "hidden states that a rank sends in one dispatch to ranks of its node; combine and both "
        "backward passes move as many; mean over ranks and dispatches",
        in_line=False,
    ),
    Metric("fsep_token_rows_inter_node", "1", "the same to ranks of other nodes", in_line=False),
    Metric("fsep_token_mb_intra_node", "MB", "the same in MB, inside the node", in_line=False),
    Metric("fsep_token_mb_inter_node", "MB", "the same in MB, to other nodes", in_line=False),
    Metric(
        "fsep_memory_headroom_gib",
        "GiB",
        "memory that was never taken: of the device what is beyond the peak of torch's reserved "
        "memory, on the CPU what is free now; the least of all ranks",
        in_line=False,
    ),
    Metric("fsep_plan_ms", "ms", "making the newest applied plan, in the planner's thread"),
    Metric("fsep_layout_version", "1", "how often the layouts have changed"),
    Metric("fsep_late_plans", "1", "plans so far that were not ready when they were due"),
    Metric(
        "fsep_plan_failures", "1", "layers so far whose planning failed, and that kept their layout"
    ),
    Metric(
        "fsep_announcement_misses",
        "1",
        "passes of layers so far whose routing was not the announced one",
        when="`--fsep-plan-mode announced`",
    ),
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

# Metrics of a step on the planner rank; `metrics` has those above, of this group and step alone.
RECORDED_OF_STEPS = (
    Metric("step", "1", "the training step, from 0"),
    Metric("step_ms", "ms", "the step, from its begin to its end"),
    Metric("dispatch_ms", "ms", "the dispatch of tokens, all layers and microbatches, both passes"),
    Metric("experts_ms", "ms", "from a dispatch's end to the combine's begin, both passes"),
    Metric("combine_ms", "ms", "the combine of tokens, both passes; it waits for the busiest rank"),
    Metric("restore_wait_ms", "ms", "waits of the compute for restored experts"),
    Metric("reduce_wait_ms", "ms", "waits of the compute for exchanges of gradients"),
    Metric("decide_ms", "ms", "the host's decisions on layouts and splits"),
    Metric("plan_ms", "ms", "as `fsep_plan_ms`"),
    Metric("version", "1", "as `fsep_layout_version`"),
    Metric("late_plans", "1", "as `fsep_late_plans`"),
    Metric("plan_failures", "1", "as `fsep_plan_failures`"),
    Metric("used_bytes", "bytes", "peak of reserved memory; on the CPU resident memory"),
    Metric("headroom_bytes", "bytes", "as `fsep_memory_headroom_gib`, of the planner rank"),
)

# Metrics of a layer in a step.
RECORDED_OF_LAYERS = (
    Metric("passes", "1", "forward passes, one per microbatch; several where layers repeat"),
    Metric("fresh", "1", "passes that got a layout of their own"),
    Metric("changed_slots", "1", "slots that were fetched after the gate, in all passes"),
    Metric("largest_tokens", "1", "tokens of the busiest rank, of the pass with the most"),
    Metric("least_tokens", "1", "the same with perfect balance in that pass"),
    Metric("max_over_mean", "1", "tokens of the busiest rank over the mean, mean of passes"),
    Metric("stock_max_over_mean", "1", "the same under stock's placement"),
    Metric("decide_ms", "ms", "the host's decision, mean of passes"),
    Metric("gain_ms", "ms", "predicted gain of a fresh layout, mean of passes that weighed it"),
    Metric("cost_ms", "ms", "predicted cost of a fresh layout, mean of passes that weighed it"),
    Metric("taken_cost_ms", "ms", "predicted cost of those that were taken, sum"),
    Metric("change_ms", "ms", "measured: waits for changed slots and decisions on these, sum"),
    Metric("predicted_ms", "ms", "predicted time of the last pass, both directions"),
    Metric("stock_ms", "ms", "the same under stock's placement"),
    Metric("balanced_ms", "ms", "the same of stock with forced balance"),
    Metric("bound_ms", "ms", "what no layout of C slots and no split gets below"),
    Metric("layer_ms", "ms", "measured time from dispatch to combine, mean of passes"),
)


def table(metrics: tuple[Metric, ...]) -> list[str]:
    lines = ["| name | unit | |", "|---|---|---|"]
    for metric in metrics:
        names = f"`{metric.name}`"
        if metric.over_layers:
            percentiles = ", ".join(f"`_p{percentile}`" for percentile in PERCENTILES)
            names += f", {percentiles}, `moe/{metric.name}_layer_{{i}}`"
        when = f" (with {metric.when})" if metric.when else ""
        unit = "" if metric.unit == "1" else metric.unit
        where = "" if metric.in_line else "; not in the log line"
        lines.append(f"| {names} | {unit} | {metric.meaning}{when}{where} |")
    return lines
