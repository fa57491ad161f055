"""Figures as dictionaries of plotly.js traces and layouts, without plotly itself.

Axes and colour bars have titles. Labels are escaped, since plotly.js reads some HTML in them.
Colours are legible on light and dark pages; `page.js` sets only fonts and grids.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.tools.report.run_data import Float64

BLUE, GREEN, RED, GREY = "#3b82c4", "#2a9d74", "#d55e00", "#8c96a0"
# Colours of a step's kinds of time, distinguishable with impaired colour vision too.
KIND_COLOURS = (GREY, BLUE, GREEN, "#7fb8de", RED, "#e69f00")
_RISING = [[0, "#b9d3e3"], [0.35, "#fdd0a2"], [0.7, "#e66e28"], [1, "#7f1914"]]
_BELOW_ONE, _ONE, _ABOVE_ONE = "#2166ac", "#c9ced4", "#b2182b"
OVER_MEAN = "× mean"
# Part of a colour bar that readers hardly tell from 1.
_HARDLY_SEEN = 0.1
_LINE = {"color": GREY, "width": 1}
_LONGEST_LABEL = 28


@dataclass(frozen=True)
class Chart:
    """Chart of the page; with `choices` of labels, one trace is shown at a time."""

    title: str
    text: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    choices: tuple[str, ...] = ()


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
    figures: Sequence[Chart]
    text: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)


def heat_map(
    title: str,
    text: str,
    values: Sequence[npt.ArrayLike],
    *,
    x: Mapping[str, Any],
    y: Sequence[Mapping[str, Any]],
    unit: str,
    bounds: tuple[float, float],
    choices: Sequence[str] = (),
    borders: Sequence[float] = (),
) -> Chart:
    """Return a figure of rows and columns from `values[trace][row][column]`.

    `unit` is the title of the colour bar; `OVER_MEAN` has different colours below and above 1.
    `bounds` are the values at the ends of the colours. `borders` are rows with a line before them.
    """
    low, high = bounds
    traces = [
        {
            "type": "heatmap",
            "x": x["values"],
            "y": axis["values"],
            "z": rounded(rows),
            "zmin": low,
            "zmax": high,
            "colorscale": _around_one(low, high) if unit == OVER_MEAN else _RISING,
            "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 10},
            "hovertemplate": f"{axis['before']}%{{y}}, {x['before']}%{{x}}: %{{z}}<extra></extra>",
            "visible": place == 0,
        }
        for place, (rows, axis) in enumerate(zip(values, y, strict=True))
    ]
    lines = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": row, "y1": row, "line": _LINE}
        for row in borders
    ]
    layout = {
        "height": min(420, max(170, 80 + 14 * len(traces[0]["z"]))),
        "margin": {"t": 10},
        "xaxis": x["axis"],
        "yaxis": {**y[0]["axis"], "autorange": "reversed"},
        "shapes": lines,
    }
    shown = np.concatenate([_numbers(rows) for rows in values])
    if shown.size and np.abs(shown - 1).max() <= _HARDLY_SEEN * (high - low):
        least, most = f"{shown.min():.3f}", f"{shown.max():.3f}"
        layout["annotations"] = [
            _note("1.000 everywhere" if least == most else f"{least} to {most}")
        ]
    return Chart(title, text, traces, layout, tuple(map(label, choices)))


def _around_one(low: float, high: float) -> list[list[Any]]:
    return [[0, _BELOW_ONE], [(1 - low) / (high - low), _ONE], [1, _ABOVE_ONE]]


def lines(
    title: str,
    text: str,
    series: Mapping[str, Sequence[float | None]],
    *,
    x: Mapping[str, Any],
    y: str,
    colours: Sequence[str],
    y_range: Sequence[float] | None = None,
) -> Chart:
    """Return a figure of lines over the steps; every second one is thin, dashed and on top."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(values) < 30 else "lines",
            "name": name,
            "x": x["values"],
            "y": list(values),
            "line": {"color": colour, "width": 1.5 if k % 2 else 3.5, "dash": _DASHES[k % 2]},
            "marker": {"size": 5 if k % 2 else 8},
        }
        for k, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True))
    ]
    axis = {
        "title": {"text": y},
        **({"range": list(y_range)} if y_range else {"rangemode": "tozero"}),
    }
    layout = {"height": 280, "xaxis": x["axis"], "yaxis": axis, "showlegend": len(traces) > 1}
    return Chart(title, text, traces, layout)


_DASHES = ("solid", "dash")


def stacked_bars(
    title: str,
    text: str,
    parts: Mapping[str, Sequence[float | None]],
    *,
    x: Mapping[str, Any],
    y: str,
    most: float | None = None,
) -> Chart:
    """Return a figure of stacked bars; without `most`, the y axis cuts off far longer columns."""
    traces = [
        {"type": "bar", "name": name, "x": x["values"], "y": values, "marker": {"color": colour}}
        for (name, values), colour in zip(parts.items(), KIND_COLOURS, strict=True)
    ]
    layout = {
        "height": 380,
        "barmode": "stack",
        "bargap": 0.08,
        "xaxis": x["axis"],
        "yaxis": {"title": {"text": y}, "range": [0, most or stack_height(parts)]},
    }
    return Chart(title, text, traces, layout)


def stack_height(parts: Mapping[str, Sequence[float | None]]) -> float:
    """Return the height for stacked bars; columns of a warm-up may exceed it."""
    sums = np.nansum(np.array(list(parts.values()), dtype=np.float64), axis=0)
    return float(min(sums.max() * 1.02, 1.6 * np.quantile(sums, 0.95))) or 1.0


def bars_by_name(
    title: str,
    text: str,
    names: Sequence[str],
    series: Mapping[str, Float64],
    *,
    x: str,
    y: str,
    colours: Sequence[str],
) -> Chart:
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": key,
            "y": labels(names),
            "x": rounded(values),
            "text": [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {"color": colour, "line": {"color": colour, "width": 2}},
        }
        for (key, values), colour in zip(series.items(), colours, strict=True)
    ]
    most = max((float(np.max(values)) for values in series.values()), default=0.0)
    layout = {
        "height": 130 + 36 * len(names),
        "xaxis": {"title": {"text": x}, "range": [0, 1.15 * most or 1]},
        "yaxis": {"title": {"text": y}, "autorange": "reversed", "type": "category"},
    }
    return Chart(title, text, traces, layout)


# Ticks at 1, 2 and 5 times powers of ten.
_LOG = {"type": "log", "dtick": "D2"}


def points(
    title: str,
    text: str,
    series: Mapping[str, tuple[Float64, Float64]],
    *,
    x: str,
    y: str,
    is_log: bool = False,
) -> Chart:
    """Return a figure of points (x, y) by name, with the line on which both are equal."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": rounded(xs),
            "y": rounded(ys),
            "marker": {"color": colour, "size": 6, "opacity": 0.6},
        }
        for (name, (xs, ys)), colour in zip(series.items(), (BLUE, RED), strict=False)
        if len(xs)
    ]
    of_x, of_y = (np.concatenate([pair[k] for pair in series.values()]) for k in (0, 1))
    ranges = [_robust(of_x), _robust(of_y)]
    kind = {"type": "linear"}
    if is_log and min(of_x.min(), of_y.min()) > 0:
        both = np.log10(np.concatenate([of_x, of_y]))
        ranges, kind = [(float(both.min()) - 0.1, float(both.max()) + 0.1)] * 2, _LOG
    # From the larger of the lower ends to the smaller of the upper ones.
    ends = [max(low for low, _ in ranges), min(high for _, high in ranges)]
    ends = [10**end for end in ends] if kind is _LOG else ends
    line = {"type": "line", "line": {**_LINE, "dash": "dot", "width": 2}, "layer": "below"}
    layout = {
        "height": 340,
        "xaxis": {"title": {"text": x}, "range": list(ranges[0]), **kind},
        "yaxis": {"title": {"text": y}, "range": list(ranges[1]), **kind},
        "shapes": [line | {"x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1]}]
        if ends[0] < ends[1]
        else [],
        "showlegend": len(series) > 1,
    }
    return Chart(title, text, traces, layout)


def _robust(values: Float64) -> tuple[float, float]:
    low, high = min(0.0, *np.quantile(values, [0.005])), max(0.0, *np.quantile(values, [0.995]))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def steps_axis(bins: Sequence[Sequence[int]], name: str = "step") -> dict[str, Any]:
    """Return the axis of bins of steps, given by the first and last step of each."""
    width = max(last - first + 1 for first, last in bins)
    means = f" (each column is a mean of up to {width})" if width > 1 else ""
    middles = [(first + last) / 2 if width > 1 else first for first, last in bins]
    axis = {"title": {"text": name + means}, "dtick": _tick(bins[-1][1] - bins[0][0])}
    return {"before": f"{name} ", "values": middles, "axis": axis}


def names_axis(title: str, names: Sequence[str], before: str = "") -> dict[str, Any]:
    """Return the axis of names, such as those of layers; readouts have `before` before them."""
    axis = {"title": {"text": title}, "type": "category"}
    return {"before": before, "values": labels(names), "axis": axis}


def numbers_axis(title: str, number: int) -> dict[str, Any]:
    axis = {"title": {"text": title}, "dtick": _tick(number)}
    return {"before": f"{title} ", "values": list(range(number)), "axis": axis}


def _tick(span: int) -> int:
    """Return the distance of about six ticks at whole numbers."""
    step = 1.0
    for factor in itertools.cycle((2, 2.5, 2)):
        if step * 7 >= span:
            break
        step *= factor
    return int(step)


def _note(text: str) -> dict[str, Any]:
    box = {"bgcolor": "#ffffffdd", "font": {"color": "#1c2126", "size": 14}, "borderpad": 4}
    return {
        "text": text,
        "xref": "paper",
        "yref": "paper",
        "x": 0.5,
        "y": 0.5,
        "showarrow": False,
        **box,
    }


def labels(names: Sequence[str]) -> list[str]:
    """Return short labels, all different, in which plotly.js finds no HTML."""
    short = [label(name) for name in names]
    return short if len(set(short)) == len(short) else [f"{n}: {s}" for n, s in enumerate(short)]


def label(name: str) -> str:
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short, quote=False)


def _numbers(values: npt.ArrayLike) -> Float64:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def rounded(values: npt.ArrayLike, digits: int = 4) -> Any:
    """Round to nested lists of numbers, with None for missing ones."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [_short(value, digits) for value in array.tolist()]


def _short(value: float, digits: int = 4) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short
