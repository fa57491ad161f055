"""Sections of the page: figures and tables, thinned out to the resolution of a screen.

Steps are put into bins of equal length, and figures draw the means of the bins. Tables and the
assessment are computed from all steps.

Legend: T steps, B bins of steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_laer.tools.report import plots
from megatron_laer.tools.report.assessment import Assessment
from megatron_laer.tools.report.bins import (
    MAX_BINS,
    bin_edges,
    binned,
    bins_of,
    in_unit,
    largest,
    over_mean,
    text_of,
)
from megatron_laer.tools.report.expert_figures import experts, replicas
from megatron_laer.tools.report.plots import (
    BLUE,
    GREEN,
    OVER_MEAN,
    RED,
    Chart,
    Section,
    Table,
    rounded,
)
from megatron_laer.tools.report.run_data import Float64, RunData

_MAX_POINTS = 1500
_NUM_WORST = 10
# A step's time by kind, from the measured parts; the rest is dense layers and optimizer.
KINDS = ("dense layers", "dispatch", "experts", "combine", "waits for restores", "for gradients")


def sections(
    run: RunData, assessment: Assessment, other: RunData | None = None
) -> Iterator[Section]:
    """Yield the sections for which there is data; `other` is a run to compare with."""
    edges = bin_edges(len(run.steps_T), MAX_BINS)
    yield _balance(run, edges)
    yield _time(run, edges, assessment)
    yield _ranks(run, edges)
    if run.experts_TLE is not None:
        yield experts(run)
    if moved := replicas(run, edges):
        yield moved
    yield _guard(run)
    yield _memory(run, edges)
    if other is not None:
        yield _comparison(run, other)


def _balance(run: RunData, edges: Sequence[int]) -> Section:
    balance_of = {"FSEP": run.imbalance_TL, "Stock's placement, same routing": run.stock_TL}
    high = max(1.01, *(largest(values) for values in balance_of.values()))
    texts = (
        "1 is perfect balance. Both figures have one scale.",
        "The busiest rank of stock expert parallelism, given the same tokens.",
    )
    figures = [
        plots.heat_map(
            f"{name}: max/mean tokens per rank",
            text,
            [binned(values_TL, edges).T],
            x=plots.steps_axis(bins_of(run, edges)),
            y=[plots.names_axis("MoE layer", run.shape.layers)],
            unit="max/mean",
            bounds=(1.0, high),
        )
        for (name, values_TL), text in zip(balance_of.items(), texts, strict=True)
    ]
    worst = Table(
        "Steps and layers with the worst balance", ("", "FSEP", "stock"), list(_worst(run))
    )
    return Section("balance", "Balance by layer and step", figures, tables=[worst])


def _worst(run: RunData) -> Iterator[tuple[str, ...]]:
    ratio_TL = np.nan_to_num(run.imbalance_TL, nan=0.0)
    for place in np.argsort(-ratio_TL, axis=None, kind="stable")[:_NUM_WORST].tolist():
        step, layer = divmod(place, ratio_TL.shape[1])
        values = (run.imbalance_TL[step, layer], run.stock_TL[step, layer])
        yield (f"step {run.steps_T[step]}, {run.shape.layers[layer]}", *map(text_of, values))


def _time(run: RunData, edges: Sequence[int], assessment: Assessment) -> Section:
    figures = [_times(run, edges)] if run.is_measured else []
    how = "the measured time from a dispatch to the end of its combine"
    figures.append(
        plots.bars_by_name(
            "Lost to imbalance by layer, all steps",
            f"Computed from {how if run.is_measured else 'predicted layer times'} and max/mean.",
            run.shape.layers,
            {"FSEP": assessment.lost_ms_L, "stock's placement": assessment.stock_lost_ms_L},
            x="time lost in all steps, ms",
            y="MoE layer",
            colours=(GREEN, RED),
        )
    )
    if run.loss:
        chosen = run.loss[:: max(1, -(-len(run.loss) // MAX_BINS))]
        steps = [[step, step] for step, _ in chosen]
        losses = [loss for _, loss in chosen]
        finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
        span = max(finite) - min(finite) or 1.0
        figures.append(
            plots.lines(
                "Loss",
                "From Megatron's log; NaN and infinite ones are missing.",
                {"lm loss": rounded(losses)},
                x=plots.steps_axis(steps, "iteration"),
                y="lm loss",
                colours=(BLUE,),
                y_range=(min(finite) - 0.1 * span, max(finite) + 0.1 * span),
            )
        )
    return Section("time", "Where time went", figures)


def _times(run: RunData, edges: Sequence[int], name: str = "", most: float | None = None) -> Chart:
    return plots.stacked_bars(
        f"{name}A step's time by kind",
        "On the planner rank. Combine waits for the busiest rank, so it includes the imbalance. "
        "Far longer columns, as of a warm-up, are cut off.",
        _time_parts(run, edges),
        x=plots.steps_axis(bins_of(run, edges)),
        y="time of a step, ms",
        most=most,
    )


def _time_parts(run: RunData, edges: Sequence[int]) -> dict[str, list[float | None]]:
    """Divide a step's time by kind. Waits for restores are within the experts' time."""
    of = {name: np.nan_to_num(values) for name, values in run.of_steps.items()}
    experts_ms = np.maximum(of["experts_ms"] - of["restore_wait_ms"], 0.0)
    parts = [of["dispatch_ms"], experts_ms, of["combine_ms"]]
    parts += [of["restore_wait_ms"], of["reduce_wait_ms"]]
    dense_ms = np.maximum(of["step_ms"] - np.sum(parts, axis=0), 0.0)
    means = (rounded(binned(part, edges)) for part in (dense_ms, *parts))
    return dict(zip(KINDS, means, strict=True))


def _ranks(run: RunData, edges: Sequence[int]) -> Section:
    kinds = {"FSEP": run.rank_tokens_TLN}
    if run.stock_rank_tokens_TLN is not None:
        kinds["Stock's placement"] = run.stock_rank_tokens_TLN
    size, num_ranks = run.shape.node_size, run.shape.num_ranks
    by_step = {
        name: binned(over_mean(tokens_TLN.sum(axis=1)), edges).T
        for name, tokens_TLN in kinds.items()
    }
    by_layer = {name: over_mean(tokens_TLN.sum(axis=0)).T for name, tokens_TLN in kinds.items()}
    figures = []
    for title, shown, axis in (
        ("all layers together", by_step, plots.steps_axis(bins_of(run, edges))),
        ("by layer, all steps", by_layer, plots.names_axis("MoE layer", run.shape.layers)),
    ):
        reach = max(0.01, *(largest(np.abs(values - 1)) for values in shown.values()))
        figures += [
            plots.heat_map(
                f"{name}: tokens of each rank, {title}",
                "Lines are borders of nodes." if size < num_ranks else "",
                [values],
                x=axis,
                y=[plots.numbers_axis("rank", num_ranks)],
                unit=OVER_MEAN,
                bounds=(max(0.0, 1 - reach), 1 + reach),
                borders=[row - 0.5 for row in range(size, num_ranks, size)],
            )
            for name, values in shown.items()
        ]
    return Section("ranks", "Ranks", figures)


def _guard(run: RunData) -> Section:
    of = run.of_layers
    passes = float(np.nansum(of["passes"]))
    share = float(np.nansum(of["fresh"])) / passes if passes else math.nan
    text = f"{text_of(100 * share)} % of microbatches got a layout of their own."
    figures = []
    cost, gain, fresh = _thinned(of["cost_ms"], of["gain_ms"], of["fresh"])
    if len(cost):
        is_fresh = fresh > 0
        figures.append(
            plots.points(
                "Decisions: predicted gain against predicted cost",
                "A point is a layer in a step, the mean of its microbatches. Above the line a "
                "fresh layout pays.",
                {
                    "kept the forecast": (cost[~is_fresh], gain[~is_fresh]),
                    "took a fresh layout": (cost[is_fresh], gain[is_fresh]),
                },
                x="predicted cost, ms",
                y="predicted gain, ms",
            )
        )
    if not run.is_measured:
        return Section("guard", "The guard", figures, text)
    predicted, measured = _thinned(of["taken_cost_ms"], of["change_ms"])
    if len(predicted):
        figures.append(
            _against_measured(
                "Fresh layouts: predicted against measured cost",
                "Measured: the host's decision, and the wait for changed slots. On the line both "
                "are equal.",
                predicted,
                measured,
            )
        )
    predicted, measured = _thinned(of["predicted_ms"], of["layer_ms"], most=None)
    if len(predicted):
        positive = predicted > 0
        factor = np.median(measured[positive] / predicted[positive]) if positive.any() else np.nan
        figures.append(
            _against_measured(
                "Layer times: predicted against measured",
                f"A point is a layer in a step. Measured times are {text_of(float(factor))} times "
                "the predicted ones (median). Far from 1, the cluster's constants do not fit this "
                "machine.",
                *_thinned(predicted, measured),
            )
        )
    return Section("guard", "The guard, and the cost model", figures, text)


def _against_measured(title: str, text: str, predicted: Float64, measured: Float64) -> Chart:
    series = {"layers": (predicted, measured)}
    return plots.points(title, text, series, x="predicted, ms", y="measured, ms", is_log=True)


def _thinned(*values: Float64, most: int | None = _MAX_POINTS) -> list[Float64]:
    """Select the places at which the first two have values, thinned out evenly."""
    flat = [each.ravel() for each in values]
    there = np.flatnonzero(np.isfinite(flat[0]) & np.isfinite(flat[1]))
    stride = 1 if most is None else max(1, -(-len(there) // most))
    return [each[there[::stride]] for each in flat]


def _memory(run: RunData, edges: Sequence[int]) -> Section:
    x = plots.steps_axis(bins_of(run, edges))
    names = {"busiest rank": "largest_tokens", "perfect balance": "least_tokens"}
    figures = [
        plots.lines(
            "Tokens of the busiest rank, and the bound",
            "Of a step's worst layer and microbatch. A rank's activations grow with them.",
            {
                name: rounded(binned(_largest_of_layers(run.of_layers[key]), edges))
                for name, key in names.items()
            },
            x=x,
            y="tokens",
            colours=(RED, GREEN),
        )
    ]
    if "used_bytes" in run.of_steps:
        series, unit = in_unit(
            {
                "used": binned(run.of_steps["used_bytes"], edges),
                "headroom": binned(run.of_steps["headroom_bytes"], edges),
            }
        )
        figures.append(
            plots.lines(
                "Memory of the planner rank",
                "Peak of reserved memory and the remainder; on the CPU resident and free memory.",
                {name: rounded(values) for name, values in series.items()},
                x=x,
                y=unit,
                colours=(BLUE, GREEN),
            )
        )
    return Section("memory", "Memory", figures)


def _largest_of_layers(values_TL: Float64) -> Float64:
    """Return the largest value of a step's layers; NaN without any."""
    largest = np.where(np.isfinite(values_TL), values_TL, -np.inf).max(axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)


def _comparison(run: RunData, other: RunData) -> Section:
    both = [(one, bin_edges(len(one.steps_T), MAX_BINS)) for one in (run, other)]
    names = ("FSEP", "stock's placement")
    means = [
        [binned(np.ma.masked_invalid(v).mean(axis=1).filled(np.nan), edges) for v in values]
        for one, edges in both
        for values in [(one.imbalance_TL, one.stock_TL)]
    ]
    high = 1.02 * max(1.0, *(largest(values) for pair in means for values in pair))
    figures = [
        plots.lines(
            f"{one.name}: max/mean, mean of layers",
            "Both figures have one scale.",
            {name: rounded(values) for name, values in zip(names, pair, strict=True)},
            x=plots.steps_axis(bins_of(one, edges)),
            y="max/mean tokens per rank",
            colours=(GREEN, RED),
            y_range=(0.98, high),
        )
        for (one, edges), pair in zip(both, means, strict=True)
    ]
    if run.is_measured and other.is_measured:
        most = max(plots.stack_height(_time_parts(one, edges)) for one, edges in both)
        figures += [_times(one, edges, f"{one.name}: ", most) for one, edges in both]
    return Section("comparison", f"Compared with {other.name}", figures)
