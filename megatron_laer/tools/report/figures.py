"""Sections of the page: figures and tables, thinned out to the resolution of a screen.

Steps are put into bins of equal length, and figures draw the means of the bins. Tables and the
assessment are computed from all steps.

Legend: T steps, B bins of steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_laer.planner.layout import ExpertLayout, stock_owner_E
from megatron_laer.tools.report import plots
from megatron_laer.tools.report.bins import (
    MAX_BINS,
    Bins,
    bin_edges,
    binned,
    bins_of,
    edges_by_layer,
    in_unit,
    largest,
    over_mean,
    text_of,
)
from megatron_laer.tools.report.metrics_recording import Float64
from megatron_laer.tools.report.plots import (
    BLUE,
    GREEN,
    OVER_MEAN,
    RED,
    Axis,
    Chart,
    Section,
)
from megatron_laer.tools.report.recorded import RunData
from megatron_laer.tools.report.run_files import ranges

# A step's time by kind, from the measured parts; the rest is dense layers and optimizer.
KINDS = ("dense layers", "dispatch", "experts", "combine", "restore waits", "gradient waits")


def sections(run: RunData) -> Iterator[Section]:
    """Yield the sections for which there is data."""
    edges = bin_edges(len(run.steps_T), MAX_BINS)
    yield _balance(run, edges)
    yield _time(run, edges)
    yield _ranks(run, edges)
    if run.experts_TLE is not None:
        yield _experts(run)
    yield _replicas(run, edges)
    yield _guard(run)
    yield _memory(run, edges)


def _steps(run: RunData, edges: Sequence[int]) -> Axis:
    ends = int(run.iterations_T[0]), int(run.iterations_T[-1])
    return plots.steps_axis(bins_of(run, edges), ends, run.resumed)


def _balance(run: RunData, edges: Sequence[int]) -> Section:
    balance_of = {"Stock's placement": run.stock_TL, "FSEP": run.imbalance_TL}
    high = max(1.01, *(largest(values) for values in balance_of.values()))
    texts = (
        "The busiest rank of stock expert parallelism, given the same tokens.",
        "1 is perfect balance. Both maps have one scale.",
    )
    figures = [
        plots.heat_map(
            f"{name}: max/mean tokens per rank",
            text,
            [binned(values_TL, edges).T],
            x=_steps(run, edges),
            y=[plots.names_axis("MoE layer", run.shape.layers)],
            unit="max/mean",
            bounds=(1.0, high),
        )
        for (name, values_TL), text in zip(balance_of.items(), texts, strict=True)
    ]
    return Section("balance", "Balance by layer and step", figures)


def _time(run: RunData, edges: Sequence[int]) -> Section:
    times = plots.stacked_bars(
        "A step's time by kind",
        "On the planner rank. Combine waits for the busiest rank, so it includes the imbalance. "
        "Far longer columns, as of a warm-up, are cut off.",
        _time_parts(run, edges),
        x=_steps(run, edges),
        y="time of a step, ms",
    )
    return Section("time", "Where time went", [times, _loss(run)] if run.logs.loss else [times])


def _loss(run: RunData) -> Chart:
    chosen = run.logs.loss[:: max(1, -(-len(run.logs.loss) // MAX_BINS))]
    places = [[iteration, iteration] for iteration, _ in chosen]
    losses = [loss for _, loss in chosen]
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    margin = 0.1 * (max(finite) - min(finite) or 1.0)
    ends = int(run.iterations_T[0]), int(run.iterations_T[-1])
    return plots.lines(
        "Loss",
        f"From {', '.join(run.logs.names)}: the mean of a line's steps; NaN and infinite ones are "
        "missing.",
        {"lm loss": losses},
        x=plots.steps_axis(places, ends, run.resumed),
        y="lm loss",
        colours=(BLUE,),
        y_range=(min(finite) - margin, max(finite) + margin),
    )


def _time_parts(run: RunData, edges: Sequence[int]) -> dict[str, Float64]:
    """Divide a step's time by kind. Waits for restores are within the experts' time."""
    of = {name: np.nan_to_num(values) for name, values in run.of_steps.items()}
    experts_ms = np.maximum(of["experts_ms"] - of["restore_wait_ms"], 0.0)
    parts = [of["dispatch_ms"], experts_ms, of["combine_ms"]]
    parts += [of["restore_wait_ms"], of["reduce_wait_ms"]]
    dense_ms = np.maximum(of["step_ms"] - np.sum(parts, axis=0), 0.0)
    means = (binned(part, edges) for part in (dense_ms, *parts))
    return dict(zip(KINDS, means, strict=True))


def _ranks(run: RunData, edges: Sequence[int]) -> Section:
    size, num_ranks = run.shape.node_size, run.shape.num_ranks
    kinds = {"FSEP": run.rank_tokens_TLN.sum(axis=1).T}
    if run.experts_TLE is not None:
        stock_NT = np.zeros_like(kinds["FSEP"])
        owner_E = stock_owner_E(num_ranks, run.shape.num_experts)
        np.add.at(stock_NT, owner_E, run.experts_TLE.sum(axis=1).T)
        kinds = {"Stock's placement": stock_NT, **kinds}
    shown = {name: binned(over_mean(of_NT.T), edges).T for name, of_NT in kinds.items()}
    reach = max(0.01, *(largest(np.abs(values - 1)) for values in shown.values()))
    figures = [
        plots.heat_map(
            f"{name}: tokens of each rank, all layers together",
            "Lines are borders of nodes." if size < num_ranks else "",
            [values],
            x=_steps(run, edges),
            y=[plots.numbers_axis("rank", num_ranks)],
            unit=OVER_MEAN,
            bounds=(max(0.0, 1 - reach), 1 + reach),
            borders=[row - 0.5 for row in range(size, num_ranks, size)],
        )
        for name, values in shown.items()
    ]
    return Section("ranks", "Ranks", figures)


def _experts(run: RunData) -> Section:
    """Show each expert's share of tokens over an even share, by layer and bin."""
    assert run.experts_TLE is not None
    edges, layers = edges_by_layer(run), run.shape.layers
    share_BLE = over_mean(np.add.reduceat(run.experts_TLE, np.array(edges[:-1]), axis=0))
    total_LE = run.experts_TLE.sum(axis=0)
    orders = [np.argsort(-total_E, kind="stable") for total_E in total_LE]
    figure = plots.heat_map(
        "Tokens of each expert, over an even share",
        "Of the chosen layer; the experts with the most tokens first.",
        [share_BLE[:, layer, order_E].T for layer, order_E in enumerate(orders)],
        x=_steps(run, edges),
        y=[
            plots.names_axis("expert", list(map(str, order_E.tolist())), "expert ")
            for order_E in orders
        ],
        unit=OVER_MEAN,
        bounds=(0.0, max(1.01, largest(share_BLE))),
        choices=layers,
    )
    text = (
        f"{int((total_LE == 0).sum())} of {total_LE.size} experts had no token in the trace's "
        f"{ranges(run.traced)}."
    )
    return Section("experts", "Experts", [figure], text)


def _replicas(run: RunData, edges: Sequence[int]) -> Section:
    text = f"{_percent_of_passes(run, 'without_replicas')} % of microbatches had no replica."
    return Section("replicas", "Replicas", list(_layouts(run, edges)), text)


def _layouts(run: RunData, edges: Sequence[int]) -> Iterator[Chart]:
    """Draw the planned layouts, and the weights moved for layouts in use."""
    if run.layouts:
        by_layer, layers = edges_by_layer(run), run.shape.layers
        slots_BLE = _slots_by_bin(run, bins_of(run, by_layer))
        yield plots.heat_map(
            "Slots of each expert in the planned layouts",
            "Of the chosen layer.",
            [slots_BLE[:, layer].T for layer in range(len(layers))],
            x=_steps(run, by_layer),
            y=[plots.numbers_axis("expert", run.shape.num_experts)] * len(layers),
            unit="slots",
            bounds=(1.0, max(2.0, largest(slots_BLE))),
            choices=layers,
        )
    series, unit = in_unit({"received": binned(run.of_steps["weight_bytes"], edges)})
    yield plots.lines(
        "Weights moved",
        "Weights and gradients that the planner rank received in a step.",
        series,
        x=_steps(run, edges),
        y=unit,
        colours=(GREEN,),
    )


def _slots_by_bin(run: RunData, bins: Bins) -> Float64:
    """Return each expert's slots at the end of each bin; NaN before the first known layout."""
    num_layers, num_experts = len(run.shape.layers), run.shape.num_experts
    # A run begins with static layouts, which are not recorded.
    first = [run.geometry.static_layout] * num_layers
    layouts: Sequence[ExpertLayout] | None = first if run.steps_T[0] == 0 else None
    coming = list(run.layouts)[::-1]
    unknown = np.full((num_layers, num_experts), np.nan)
    slots = []
    for _, last in bins:
        while coming and coming[-1][0] < last:  # a step, which counts from 0, and an iteration
            layouts = coming.pop()[1]
        slots.append(unknown if layouts is None else [layout.replicas_E for layout in layouts])
    return np.array(slots, dtype=np.float64)


def _guard(run: RunData) -> Section:
    text = f"{_percent_of_passes(run, 'fresh')} % of microbatches got a layout of their own."
    return Section("guard", "The guard", [], text)


def _percent_of_passes(run: RunData, name: str) -> str:
    passes = np.nansum(run.of_layers["passes"])
    return text_of(100 * np.nansum(run.of_layers[name]) / passes if passes else math.nan)


def measured_over_predicted(run: RunData) -> str:
    """Compare the layers' measured times with those predicted; "" without any."""
    measured, predicted = run.of_layers["layer_ms"], run.of_layers["predicted_ms"]
    there = np.isfinite(measured) & (predicted > 0)
    if not there.any():
        return ""
    low, median, high = np.quantile(measured[there] / predicted[there], (0.1, 0.5, 0.9))
    return (
        f"A layer's measured time is {text_of(median)} times the predicted one (median; "
        f"{text_of(low)} to {text_of(high)} in four of five). Far from 1, the cluster's constants "
        "do not fit this machine."
    )


def _memory(run: RunData, edges: Sequence[int]) -> Section:
    names = {"busiest rank": "largest_tokens", "perfect balance": "least_tokens"}
    tokens = plots.lines(
        "Tokens of the busiest rank, and the bound",
        "Of a step's worst layer and microbatch. A rank's activations grow with them.",
        {of: binned(_largest_of_layers(run.of_layers[key]), edges) for of, key in names.items()},
        x=_steps(run, edges),
        y="tokens",
        colours=(RED, GREEN),
    )
    kinds = {"used": "used_bytes", "headroom": "headroom_bytes"}
    series, unit = in_unit({k: binned(run.of_steps[name], edges) for k, name in kinds.items()})
    memory = plots.lines(
        "Memory of the planner rank",
        "Peak of reserved memory and the remainder; on the CPU resident and free memory.",
        series,
        x=_steps(run, edges),
        y=unit,
        colours=(BLUE, GREEN),
    )
    return Section("memory", "Memory", [tokens, memory])


def _largest_of_layers(values_TL: Float64) -> Float64:
    """Return the largest value of a step's layers; NaN without any."""
    largest = np.where(np.isfinite(values_TL), values_TL, -np.inf).max(axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)
