"""Drawing of the convergence benchmark's runs in four panels; nothing is computed here.

Colours distinguish auxiliary losses; they are those of Okabe and Ito, safe for colour-blind
readers. Line styles distinguish the ways to train.

Legend: W windows of steps, L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.convergence_results import Runs, auxes, shares_WLE, smoothed
from benchmarks.convergence_runs import AUX, FSEP, NO_AUX, POINTS, ROUNDING, STOCK, Run
from megatron_laer.files.writing import replaced_when_complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {NO_AUX: "#0072B2", AUX: "#D55E00"}
_NAMES = {NO_AUX: "no aux loss", AUX: f"aux loss {AUX}"}
# Stock is a wide pale line, so that FSEP's narrow one is visible on it.
_LINES: dict[str, dict[str, Any]] = {
    STOCK: {"linewidth": 5, "alpha": 0.35},
    FSEP: {"linewidth": 1.3},
    ROUNDING: {"linewidth": 1.3, "linestyle": (0, (2, 1.5)), "alpha": 0.8},
}


def write_figure(runs: Runs, path: Path) -> None:
    """Draw all runs into a file in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.6), dpi=120, layout="constrained")
    (losses, gaps), (experts, ranks) = figure.subplots(2, 2)
    _draw_losses(losses, runs)
    _draw_gaps(gaps, runs)
    _draw_experts(experts, runs)
    _draw_ranks(ranks, runs)
    places = ("upper right", "upper left", "upper right", "center right")
    for axes, place in zip((losses, gaps, experts, ranks), places, strict=True):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    with replaced_when_complete(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))


def _draw_losses(axes: Axes, runs: Runs) -> None:
    for way, aux, run in _of(runs, STOCK, FSEP):
        _draw_steps(axes, run, run.losses, _LINES[way], f"{way}, {_NAMES[aux]}", aux)
        axes.plot(
            [(window + 1) * len(run.losses) // POINTS for window in range(POINTS)],
            run.validation,
            color=_COLOURS[aux],
            linestyle="",
            marker="o" if way == STOCK else "x",
            markersize=8 if way == STOCK else 5,
            markerfacecolor="none",
        )
    axes.set_title("(a) training loss; validation: ○ stock, × FSEP")
    axes.set_ylabel("loss per byte")
    # The steep start is the same for all runs, and would use most of the range.
    curves = [smoothed(run.losses, _width(run)) for _, _, run in _of(runs, STOCK, FSEP)]
    ends = [float(curve[len(curve) // 20 :].max()) for curve in curves]
    axes.set_ylim(top=max(ends))
    axes.set_xlabel("step")


def _draw_gaps(axes: Axes, runs: Runs) -> None:
    for way, aux, run in _of(runs, FSEP, ROUNDING):
        stock = runs[STOCK, aux].losses
        differences = [mine - stocks for mine, stocks in zip(run.losses, stock, strict=True)]
        _draw_steps(axes, run, differences, _LINES[way], f"{way}, {_NAMES[aux]}", aux)
    axes.margins(y=0.5)  # room for the legend
    axes.set_title("(b) training loss less stock's")
    axes.set_xlabel("step")


def _draw_experts(axes: Axes, runs: Runs) -> None:
    for way, aux, run in _of(runs, STOCK, FSEP):
        last_LE = -np.sort(-shares_WLE(run)[-1], axis=-1)
        shares_E = 100 * last_LE.mean(axis=0)
        axes.plot(
            range(1, len(shares_E) + 1),
            shares_E,
            color=_COLOURS[aux],
            label=f"{way}, {_NAMES[aux]}",
            marker="o" if way == STOCK else "x",
            **_LINES[way],
        )
    axes.axhline(100 / len(shares_E), color="0.4", linestyle=":", label="even")
    axes.set_ylim(bottom=0)
    axes.set_title("(c) use of experts, last tenth of the run")
    axes.set_xlabel("expert, the busiest of its layer first")
    axes.set_ylabel("% of a layer's tokens, mean of layers")


def _draw_ranks(axes: Axes, runs: Runs) -> None:
    for way, aux, run in _of(runs, STOCK, FSEP):
        _draw_steps(axes, run, run.max_over_mean, _LINES[way], f"{way}, {_NAMES[aux]}", aux)
    axes.set_title("(d) tokens of the busiest rank over the mean")
    axes.set_xlabel("step")


def _of(runs: Runs, *ways: str) -> list[tuple[str, str, Run]]:
    return [(way, aux, runs[way, aux]) for aux in auxes(runs) for way in ways]


def _draw_steps(
    axes: Axes, run: Run, values: list[float], line: dict[str, Any], label: str, aux: str
) -> None:
    width = _width(run)
    means = smoothed(values, width)
    steps = range(width, width + len(means))
    axes.plot(steps, means, color=_COLOURS[aux], label=label, **line)


def _width(run: Run) -> int:
    return max(1, len(run.losses) // 40)
