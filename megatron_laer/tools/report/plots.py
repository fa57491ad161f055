"""Figures as dictionaries of plotly.js traces and layouts, without plotly itself.

Axes and colour bars have titles. Labels are escaped, since plotly.js reads some HTML in them.
Colours are legible on light and dark pages; `page.js` sets only fonts and grids.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLUE, GREEN, RED, GREY = "#3b82c4", "#2a9d74", "#d55e00", "#8c96a0"
# Colours of a step's kinds of time, distinguishable with impaired colour vision too.
KIND_COLOURS = (GREY, BLUE, GREEN, "#7fb8de", RED, "#e69f00")
_RISING = [[0, "#b9d3e3"], [0.35, "#fdd0a2"], [0.7, "#e66e28"], [1, "#7f1914"]]
_BELOW_ONE, _ONE, _ABOVE_ONE = "#2166ac", "#c9ced4", "#b2182b"
OVER_MEAN = "× mean"
# Part of a colour bar that readers hardly tell from none.
_HARDLY_SEEN = 0.1
_LINE = {"type": "line", "line": {"color": GREY, "width": 1}}
_LONGEST_LABEL = 28


@dataclass(frozen=True)
class Chart:
    """Chart of the page; with `choices` of labels, one trace is shown at a time.

    Charts `by_steps` share the range of their x axis.
    """

    title: str
    text: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    choices: tuple[str, ...] = ()
    by_steps: bool = False


@dataclass(frozen=True)
class Section:
    """Section of the page."""

    id: str
    title: str
    figures: Sequence[Chart]
    text: str = ""


@dataclass(frozen=True)
class Axis:
    """Values of an axis with plotly's settings for it, and the text before a value's readout.

    `resumed` are iterations with which a run went on after a stop; figures mark them.
    """

    values: Sequence[Any]
    settings: dict[str, Any]
    before: str = ""
    resumed: Sequence[int] | None = None


def _chart(
    title: str,
    text: str,
    traces: list[dict[str, Any]],
    x: Axis,
    layout: dict[str, Any],
    choices: Sequence[str] = (),
) -> Chart:
    """Return a chart over `x`, with a line before each step that resumes a run."""
    places = [step - 0.5 for step in x.resumed or ()]
    marks = [_LINE | {"yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at} for at in places]
    notes = [_note("resumed", 10) | {"xref": "x", "x": at, "y": 1, **_CORNER} for at in places]
    layout = {"xaxis": x.settings, **layout, "shapes": [*layout.get("shapes", ()), *marks]}
    layout["annotations"] = [*layout.get("annotations", ()), *notes]
    return Chart(title, text, traces, layout, tuple(map(label, choices)), x.resumed is not None)


def heat_map(
    title: str,
    text: str,
    values: Sequence[npt.ArrayLike],
    *,
    x: Axis,
    y: Sequence[Axis],
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
    rising = [[0, _BELOW_ONE], [(1 - low) / (high - low), _ONE], [1, _ABOVE_ONE]]
    traces = [
        {
            "type": "heatmap",
            "x": x.values,
            "y": axis.values,
            "z": rounded(rows),
            "zmin": low,
            "zmax": high,
            "colorscale": rising if unit == OVER_MEAN else _RISING,
            "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 10},
            "hovertemplate": f"{axis.before}%{{y}}, {x.before}%{{x}}: %{{z}}<extra></extra>",
            "visible": place == 0,
        }
        for place, (rows, axis) in enumerate(zip(values, y, strict=True))
    ]
    layout = {
        "height": min(420, max(200, 80 + 14 * len(traces[0]["z"]))),
        "margin": {"t": 10},
        "yaxis": {**y[0].settings, "autorange": "reversed"},
        "shapes": [_LINE | {"xref": "paper", "x0": 0, "x1": 1, "y0": b, "y1": b} for b in borders],
    }
    shown = np.concatenate([np.asarray(rows, dtype=np.float64).ravel() for rows in values])
    shown = shown[np.isfinite(shown)]
    if shown.size and np.ptp(shown) <= _HARDLY_SEEN * (high - low):
        least, most = f"{shown.min():.3f}", f"{shown.max():.3f}"
        note = _note(f"{least} everywhere" if least == most else f"{least} to {most}")
        layout["annotations"] = [note]
    return _chart(title, text, traces, x, layout, choices)


_CORNER = {"xanchor": "left", "yanchor": "top", "borderpad": 1}


def _note(text: str, size: int = 14) -> dict[str, Any]:
    return {
        "text": text,
        **dict.fromkeys(("xref", "yref"), "paper"),
        **dict.fromkeys(("x", "y"), 0.5),
        "showarrow": False,
        "bgcolor": "#ffffffdd",
        "borderpad": 4,
        "font": {"color": "#1c2126", "size": size},
    }


def lines(
    title: str,
    text: str,
    series: Mapping[str, npt.ArrayLike],
    *,
    x: Axis,
    y: str,
    colours: Sequence[str],
    y_range: Sequence[float] | None = None,
) -> Chart:
    """Return a figure of lines over the steps; every second one is thin, dashed and on top."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(x.values) < 30 else "lines",
            "name": name,
            "x": x.values,
            "y": rounded(values),
            "line": {"color": colour, **_STROKES[k % 2]},
            "marker": {"size": 5 if k % 2 else 8},
        }
        for k, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True))
    ]
    axis = {"title": {"text": y}, **({"range": list(y_range)} if y_range else {})}
    layout = {"height": 280, "yaxis": axis, "showlegend": len(traces) > 1}
    return _chart(title, text, traces, x, layout)


_STROKES = ({"width": 3.5, "dash": "solid"}, {"width": 1.5, "dash": "dash"})


def stacked_bars(
    title: str, text: str, parts: Mapping[str, npt.NDArray[np.float64]], *, x: Axis, y: str
) -> Chart:
    """Return a figure of stacked bars; the y axis cuts off far longer columns, as of a warm-up."""
    traces = [
        {"type": "bar", "name": name, "x": x.values, "y": rounded(values), "marker": {"color": of}}
        for (name, values), of in zip(parts.items(), KIND_COLOURS, strict=True)
    ]
    sums = np.nansum([*parts.values()], axis=0)
    height = float(min(sums.max() * 1.02, 1.6 * np.quantile(sums, 0.95))) or 1.0
    axis = {"title": {"text": y}, "range": [0, height]}
    layout = {"height": 380, "barmode": "stack", "bargap": 0.08, "yaxis": axis}
    return _chart(title, text, traces, x, layout)


def steps_axis(
    bins: Sequence[Sequence[int]], ends: tuple[int, int], resumed: Sequence[int] = ()
) -> Axis:
    """Return the axis of bins of steps, given by the first and last iteration of each.

    `ends` are the first and last iteration of all figures.
    """
    first, last = ends
    width = max(end - begin + 1 for begin, end in bins)
    means = f" (each column is a mean of up to {width})" if width > 1 else ""
    middles = [(begin + end) / 2 if width > 1 else begin for begin, end in bins]
    settings = {
        "title": {"text": f"iteration{means}"},
        "dtick": _tick(last - first),
        "range": [first - 0.5, last + 0.5],
    }
    return Axis(middles, settings, "iteration ", resumed)


def names_axis(title: str, names: Sequence[str], before: str = "") -> Axis:
    """Return the axis of names, such as those of layers; readouts have `before` before them."""
    return Axis(labels(names), {"title": {"text": title}, "type": "category"}, before)


def numbers_axis(title: str, number: int) -> Axis:
    settings = {"title": {"text": title}, "dtick": _tick(number)}
    return Axis(list(range(number)), settings, f"{title} ")


def _tick(span: int) -> int:
    """Return the distance of about six ticks at whole numbers."""
    step = 1.0
    for factor in itertools.cycle((2, 2.5, 2)):
        if step * 7 >= span:
            break
        step *= factor
    return int(step)


def labels(names: Sequence[str]) -> list[str]:
    """Return short labels, all different, in which plotly.js finds no HTML."""
    short = [label(name) for name in names]
    return short if len(set(short)) == len(short) else [f"{n}: {s}" for n, s in enumerate(short)]


def label(name: str) -> str:
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short, quote=False)


def rounded(values: npt.ArrayLike) -> Any:
    """Round to nested lists of numbers with four digits, with None for missing ones."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row) for row in array]
    return [_short(value) for value in array.tolist()]


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short
