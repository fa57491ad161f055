"""Sections of the page: figures and tables, thinned out to the resolution of a screen.

Steps are put into bins of equal length, and figures draw the means of the bins. Tables and the
assessment are computed from all steps.

Legend: T steps, B bins of steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.tools.report import plots
from megatron_laer.tools.report.assessment import Assessment
from megatron_laer.tools.report.plots import BLUE, GREEN, OVER_MEAN, RED, Figure, rounded
from megatron_laer.tools.report.run_data import Float64, RunData

# Columns of a figure, and cells of a figure with a picture for each layer.
MAX_BINS = 240
_MAX_CELLS = 80_000
_MAX_POINTS = 1500
_NUM_WORST = 10
# A step's time by kind, from the measured parts; the rest is dense layers and optimizer.
KINDS = ("dense layers", "dispatch", "experts", "combine", "waits for restores", "for gradients")
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))

Bins = list[list[int]]


@dataclass(frozen=True)
class Table:
    """Table that a reader opens; the first cell of a row names it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """Section of the page."""

    id: str
    title: str
    figures: Sequence[Figure]
    text: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)


def sections(
    run: RunData, assessment: Assessment, other: RunData | None = None
) -> Iterator[Section]:
    """Yield the sections for which there is data.

    Args:
        other: a run to compare with.
    """
    edges = bin_edges(len(run.steps_T), MAX_BINS)
    yield _balance(run, edges)
    yield _time(run, edges, assessment)
    yield _ranks(run, edges)
    if run.experts_TLE is not None:
        yield _experts(run)
    if run.layouts:
        yield _replicas(run)
    yield _guard(run)
    yield _memory(run, edges)
    if other is not None:
        yield _comparison(run, other)


def bin_edges(number: int, most: int) -> list[int]:
    """Divide so many steps into at most `most` bins of equal length; the last may be shorter."""
    length = max(1, -(-number // most))
    return [*range(0, number, length), number]


def binned(values: Float64, edges: Sequence[int]) -> Float64:
    """Return the means of each bin along the first axis, without missing values."""
    is_there = np.isfinite(values)
    starts = np.array(edges[:-1])
    sums = np.add.reduceat(np.where(is_there, values, 0.0), starts, axis=0)
    numbers = np.add.reduceat(is_there.astype(np.float64), starts, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Float64 = sums / numbers
    return means


def _bins(run: RunData, edges: Sequence[int]) -> Bins:
    """Return the first and last step of each bin."""
    steps = run.steps_T.tolist()
    return [[steps[begin], steps[end - 1]] for begin, end in itertools.pairwise(edges)]


def _balance(run: RunData, edges: Sequence[int]) -> Section:
    balance_of = {"FSEP": run.imbalance_TL, "Stock's placement, same routing": run.stock_TL}
    high = max(1.01, *(_largest(values) for values in balance_of.values()))
    texts = (
        "1 is perfect balance. Both figures have one scale.",
        "The busiest rank of stock expert parallelism, given the same tokens.",
    )
    figures = [
        plots.heat_map(
            f"{name}: max/mean tokens per rank",
            text,
            [binned(values_TL, edges).T],
            x=plots.steps_axis(_bins(run, edges)),
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


def _largest(values: Float64) -> float:
    there = values[np.isfinite(values)]
    return float(there.max()) if there.size else 0.0


def _worst(run: RunData) -> Iterator[tuple[str, ...]]:
    """Yield the steps and layers with the largest max/mean."""
    ratio_TL = np.nan_to_num(run.imbalance_TL, nan=0.0)
    for place in np.argsort(-ratio_TL, axis=None, kind="stable")[:_NUM_WORST].tolist():
        step, layer = divmod(place, ratio_TL.shape[1])
        values = (run.imbalance_TL[step, layer], run.stock_TL[step, layer])
        yield (f"step {run.steps_T[step]}, {run.shape.layers[layer]}", *map(_text, values))


def _text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


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
        losses = rounded([loss for _, loss in chosen])
        span = max(losses) - min(losses) or 1.0
        figures.append(
            plots.lines(
                "Loss",
                "From Megatron's log.",
                {"lm loss": losses},
                x=plots.steps_axis(steps, "iteration"),
                y="lm loss",
                colours=(BLUE,),
                y_range=(min(losses) - 0.1 * span, max(losses) + 0.1 * span),
            )
        )
    return Section("time", "Where time went", figures)


def _times(run: RunData, edges: Sequence[int], name: str = "", most: float | None = None) -> Figure:
    return plots.stacked_bars(
        f"{name}A step's time by kind",
        "On the planner rank. Combine waits for the busiest rank, so it includes the imbalance. "
        "Far longer columns, as of a warm-up, are cut off.",
        _time_parts(run, edges),
        x=plots.steps_axis(_bins(run, edges)),
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
    """Show each rank's tokens over the mean: by bin over all layers, and by layer."""
    kinds = {"FSEP": run.rank_tokens_TLN}
    if run.stock_rank_tokens_TLN is not None:
        kinds["Stock's placement"] = run.stock_rank_tokens_TLN
    size, num_ranks = run.shape.node_size, run.shape.num_ranks
    by_step = {
        name: binned(_over_mean(tokens_TLN.sum(axis=1)), edges).T
        for name, tokens_TLN in kinds.items()
    }
    by_layer = {name: _over_mean(tokens_TLN.sum(axis=0)).T for name, tokens_TLN in kinds.items()}
    figures = []
    for title, shown, axis in (
        ("all layers together", by_step, plots.steps_axis(_bins(run, edges))),
        ("by layer, all steps", by_layer, plots.names_axis("MoE layer", run.shape.layers)),
    ):
        reach = max(0.01, *(_largest(np.abs(values - 1)) for values in shown.values()))
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


def _over_mean(tokens: npt.NDArray[np.int64]) -> Float64:
    mean = tokens.mean(axis=-1, keepdims=True)
    over: Float64 = np.where(mean > 0, tokens / np.maximum(mean, 1e-9), np.nan)
    return over


def _edges_by_layer(run: RunData) -> list[int]:
    """Return the bins of a figure that has a picture for each layer."""
    cells = len(run.shape.layers) * run.shape.num_experts
    return bin_edges(len(run.steps_T), max(1, min(MAX_BINS, _MAX_CELLS // cells)))


def _experts(run: RunData) -> Section:
    """Show each expert's share of tokens over an even share, by layer and bin."""
    assert run.experts_TLE is not None
    edges, layers = _edges_by_layer(run), run.shape.layers
    share_BLE = _over_mean(np.add.reduceat(run.experts_TLE, np.array(edges[:-1]), axis=0))
    total_LE = run.experts_TLE.sum(axis=0)
    orders = [np.argsort(-total_E, kind="stable") for total_E in total_LE]
    figure = plots.heat_map(
        "Tokens of each expert, over an even share",
        "Of the chosen layer; the experts with the most tokens first.",
        [share_BLE[:, layer, order_E].T for layer, order_E in enumerate(orders)],
        x=plots.steps_axis(_bins(run, edges)),
        y=[
            plots.names_axis("expert", list(map(str, order_E.tolist())), "expert ")
            for order_E in orders
        ],
        unit=OVER_MEAN,
        bounds=(0.0, max(1.01, _largest(share_BLE))),
        choices=layers,
    )
    drifts = _drift(share_BLE)
    table = Table(
        "Experts without tokens, Gini coefficient and drift by layer",
        ("layer", "experts without a token", "Gini coefficient", "cosine of neighbouring columns"),
        [
            (name, str(int((total_E == 0).sum())), _text(_gini(total_E)), _text(drift))
            for name, total_E, drift in zip(layers, total_LE, drifts, strict=True)
        ],
    )
    return Section("experts", "Experts", [figure], tables=[table])


def _gini(tokens_E: npt.NDArray[np.int64]) -> float:
    """Return the Gini coefficient: 0 for equal shares, near 1 for a single expert."""
    ordered_E = np.sort(tokens_E)
    total = float(ordered_E.sum())
    if total == 0:
        return math.nan
    number = len(ordered_E)
    place_E = np.arange(1, number + 1)
    return float(2 * (place_E * ordered_E).sum() / (number * total) - (number + 1) / number)


def _drift(share_BLE: Float64) -> list[float]:
    """Return the mean cosine of experts' shares in neighbouring bins, by layer."""
    share_BLE = np.nan_to_num(share_BLE)
    found = []
    for layer in range(share_BLE.shape[1]):
        one, other = share_BLE[:-1, layer], share_BLE[1:, layer]
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        products = (one * other).sum(axis=1)
        found.append(float(np.mean(products[norms > 0] / norms[norms > 0])) if norms.any() else 1.0)
    return found


def _replicas(run: RunData) -> Section:
    """Show replicas of each expert by layer and bin, from the bin's last layouts."""
    edges, layers = _edges_by_layer(run), run.shape.layers
    bins = _bins(run, edges)
    replicas_BLE, planned_B = _layouts_by_bin(run, bins)
    fetched_B = [
        float(np.nansum(run.of_layers["changed_slots"][begin:end]))
        for begin, end in itertools.pairwise(edges)
    ]
    x = plots.steps_axis(bins)
    figure = plots.heat_map(
        "Slots of each expert in the planned layouts",
        "Of the chosen layer.",
        [replicas_BLE[:, layer].T for layer in range(len(layers))],
        x=x,
        y=[plots.numbers_axis("expert", run.shape.num_experts)] * len(layers),
        unit="slots",
        bounds=(1.0, max(2.0, _largest(replicas_BLE))),
        choices=layers,
    )
    bytes_of_slot = _slot_bytes(run.settings)
    slots = {"planned": np.array(planned_B), "fetched after the gate": np.array(fetched_B)}
    series, unit = (
        (slots, "slots")
        if bytes_of_slot is None
        else _in_unit({name: values * bytes_of_slot for name, values in slots.items()})
    )
    changed = plots.lines(
        "Slots that changed, all layers" if unit == "slots" else "Weights of changed slots",
        "Planned ones change between steps, and restores bring them at no extra cost; fetched ones "
        "changed after the gate. Of all layers and the steps of a column.",
        {name: rounded(values) for name, values in series.items()},
        x=x,
        y=unit,
        colours=(BLUE, RED),
    )
    return Section("replicas", "Replicas", [figure, changed])


def _layouts_by_bin(run: RunData, bins: Bins) -> tuple[Float64, list[int]]:
    """Return the replicas at the end of each bin, and the slots that changed in it."""
    num_layers, num_experts = len(run.shape.layers), run.shape.num_experts
    static = ExpertLayout.static(run.shape.num_ranks, run.shape.capacity, num_experts)
    # A run begins with static layouts, which are not recorded.
    layouts: Sequence[ExpertLayout] | None = [static] * num_layers if run.steps_T[0] == 0 else None
    coming = list(run.layouts)[::-1]
    replicas, changed_B = [], []
    for _, last in bins:
        changed = 0
        while coming and coming[-1][0] <= last:
            before, (_, layouts) = layouts, coming.pop()
            changed += sum(
                int((one.slot_expert_S != new.slot_expert_S).sum())
                for one, new in zip(before or layouts, layouts, strict=True)
            )
        changed_B.append(changed)
        unknown = np.full((num_layers, num_experts), np.nan)
        replicas.append(unknown if layouts is None else [layout.replicas_E for layout in layouts])
    return np.array(replicas, dtype=np.float64), changed_B


def _slot_bytes(settings: Sequence[tuple[str, str]]) -> int | None:
    """Return the bytes of an expert's weights, from the recorded settings."""
    of = dict(settings)
    try:
        hidden, ffn, each = (int(of[name]) for name in ("hidden", "ffn", "bytes_per_element"))
    except (KeyError, ValueError):
        return None
    return (3 if of.get("gated") == "True" else 2) * hidden * ffn * each


def _in_unit(series: dict[str, Float64]) -> tuple[dict[str, Float64], str]:
    """Return numbers of bytes in a unit that fits the largest."""
    most = max(_largest(values) for values in series.values())
    unit, size = next(((u, s) for u, s in _UNITS if most >= s), _UNITS[-1])
    return {name: values / size for name, values in series.items()}, unit


def _guard(run: RunData) -> Section:
    """Show the guard's choices and the cost model's predictions: a point per step and layer."""
    of = run.of_layers
    passes = float(np.nansum(of["passes"]))
    share = float(np.nansum(of["fresh"])) / passes if passes else math.nan
    text = f"{_text(100 * share)} % of microbatches got a layout of their own."
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
                f"A point is a layer in a step. Measured times are {_text(float(factor))} times "
                "the predicted ones (median). Far from 1, the cluster's constants do not fit this "
                "machine.",
                *_thinned(predicted, measured),
            )
        )
    return Section("guard", "The guard, and the cost model", figures, text)


def _against_measured(title: str, text: str, predicted: Float64, measured: Float64) -> Figure:
    series = {"layers": (predicted, measured)}
    return plots.points(title, text, series, x="predicted, ms", y="measured, ms", is_log=True)


def _thinned(*values: Float64, most: int | None = _MAX_POINTS) -> list[Float64]:
    """Return the places at which the first two have values, thinned out evenly."""
    flat = [each.ravel() for each in values]
    there = np.flatnonzero(np.isfinite(flat[0]) & np.isfinite(flat[1]))
    stride = 1 if most is None else max(1, -(-len(there) // most))
    return [each[there[::stride]] for each in flat]


def _memory(run: RunData, edges: Sequence[int]) -> Section:
    """Show tokens of the busiest rank and the bound, and measured bytes."""
    x = plots.steps_axis(_bins(run, edges))
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
        series, unit = _in_unit(
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
    """Return the largest of a step's layers; NaN without any."""
    largest = np.where(np.isfinite(values_TL), values_TL, -np.inf).max(axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)


def _comparison(run: RunData, other: RunData) -> Section:
    """Show the balance and times of two runs next to each other, on one scale."""
    both = [(one, bin_edges(len(one.steps_T), MAX_BINS)) for one in (run, other)]
    names = ("FSEP", "stock's placement")
    means = [
        [binned(np.ma.masked_invalid(v).mean(axis=1).filled(np.nan), edges) for v in values]
        for one, edges in both
        for values in [(one.imbalance_TL, one.stock_TL)]
    ]
    high = 1.02 * max(1.0, *(_largest(values) for pair in means for values in pair))
    figures = [
        plots.lines(
            f"{one.name}: max/mean, mean of layers",
            "Both figures have one scale.",
            {name: rounded(values) for name, values in zip(names, pair, strict=True)},
            x=plots.steps_axis(_bins(one, edges)),
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
