"""The page: one HTML file with its scripts, style and data.

The same data give the same bytes. jinja2 escapes all text from a run; within the data, `<`, `>`
and `&` are JSON escapes. The page's policy forbids the browser to load anything. The browser
unpacks `plotly-cartesian.min.js.gz`: the file in npm's package `plotly.js-cartesian-dist-min` 4.1.1
(MIT, `plotly.LICENSE`), packed by `gzip -9n`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from megatron_laer.telemetry.metrics import LOGGED
from megatron_laer.tools.report.assessment import assess, percent, seconds
from megatron_laer.tools.report.figures import sections
from megatron_laer.tools.report.metrics_recording import Float64
from megatron_laer.tools.report.recorded import RunData
from megatron_laer.tools.report.what_if import WhatIf
from megatron_laer.tools.simulator.comparison import STOCK, TOLERANCE
from megatron_laer.version import __version__

_FOLDER = resources.files("megatron_laer.tools.report") / "page"
# Values of the assessment and of a what-if row in the page's data.
_OF_VERDICT = ("kept", "kept_by_stock", "total_s", "imbalance_s", "exchanges_s", "stock_s")
_OF_ROW = (
    *("strategy", "mode", "capacity", "cases", "mean", "p99"),
    *("off_node_share", "replan_share", "layer_ms"),
)
# Another quantity than the verdict's share of balance, of nearly the same name: of MoE layers
# alone, and predicted.
_LEFT_OUT = "fsep_share_of_forced_balance"
# From which gain on another setting is worth a try.
_WORTH_A_TRY = 0.02


def page(run: RunData, rows: Sequence[WhatIf], predicted_for: str = "") -> str:
    """Render the page; `predicted_for` describes the settings of the predictions in `rows`."""
    assessment = assess(run)
    shown = list(sections(run))
    data = {
        "format": "megatron_laer-report",
        "version": 3,
        "name": run.name,
        "verdict": {name: getattr(assessment, name) for name in _OF_VERDICT},
        "figures": [vars(figure) for section in shown for figure in section.figures],
        "what_if": [
            {name: getattr(row.row, name) for name in _OF_ROW} | {"command": row.command}
            for row in rows
        ],
    }
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (_FOLDER / name).read_text(encoding="utf-8")),
    )
    own = next((row for row in rows if _is_own(row, run)), None)
    return environment.get_template("page.html").render(
        name=run.name,
        about=_about(run),
        version=__version__,
        assessment=f"{assessment.sentence()}.",
        causes=assessment.causes(run.shape.layers),
        notes=run.notes,
        six=list(_six_numbers(run)),
        all_numbers=list(_all_numbers(run)),
        sections=shown,
        what_if=[_line(equal, own, run) for equal in _equal_rows(rows)],
        advice=_advice(rows, own),
        predicted_for=f"Of {rows[0].row.cases} microbatches of one layer each, for {predicted_for}."
        if rows
        else "",
        settings=run.settings,
        data=_embedded(data),
        plotly=base64.b64encode((_FOLDER / "plotly-cartesian.min.js.gz").read_bytes()).decode(),
    )


def _embedded(data: dict[str, Any]) -> str:
    """Return JSON in which no text can end the script element early."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _about(run: RunData) -> str:
    shape, of = run.shape, dict(run.settings)
    sizes = f" of {of['hidden']} x {of['ffn']}" if {"hidden", "ffn"} <= {*of} else ""
    parts = [
        f"{len(shape.layers)} MoE layers, {shape.num_experts} experts{sizes}",
        f"{shape.num_ranks} ranks, {shape.node_size} per node, {shape.capacity} slots per rank",
        f"cluster {of['cluster']}" if "cluster" in of else "",
        run.recorded,
    ]
    return " · ".join(filter(None, parts))


def _six_numbers(run: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield the numbers next to the maps of balance: with stock's placement, FSEP's, meaning."""
    assessment = assess(run)
    yield _mean(run.stock_TL), _mean(run.imbalance_TL), "max/mean tokens per rank, mean"
    shares = percent(assessment.kept_by_stock), percent(assessment.kept)
    yield *shares, "of perfectly balanced speed; stock's is an estimate"
    lost = seconds(assessment.stock_s), seconds(assessment.imbalance_s)
    yield *lost, f"lost to imbalance; {seconds(assessment.total_s)} were measured in all"


def _mean(values: Float64) -> str:
    there = values[np.isfinite(values)]
    return f"{there.mean():.3f}" if there.size else "–"


def _all_numbers(run: RunData) -> Iterator[tuple[str, str]]:
    assessment = assess(run)
    yield "steps", f"{len(run.steps_T)} ({run.steps_T[0]} to {run.steps_T[-1]})"
    if np.isfinite(run.of_steps["step_ms"]).any():
        median_ms = float(np.nanmedian(run.of_steps["step_ms"]))
        yield "step time, median", seconds(median_ms * 1e-3)
    yield "waits for exchanges and decisions", seconds(assessment.exchanges_s)
    for name, values in (
        ("max/mean tokens per rank", run.imbalance_TL),
        ("the same under stock's placement", run.stock_TL),
    ):
        there = values[np.isfinite(values)]
        if there.size:
            parts = [f"p{p} {np.percentile(there, p):.3f}" for p in (50, 95, 99)]
            yield name, ", ".join([*parts, f"max {there.max():.3f}"])
    for metric in LOGGED:
        logged = run.metrics.get(metric.name)
        if metric.over_layers or metric.name == _LEFT_OUT or logged is None:
            continue
        if np.isfinite(logged).any():
            unit = f" {metric.unit}" if metric.unit else ""
            yield f"{metric.name}, mean of steps", f"{np.nanmean(logged):.4g}{unit}"
    if run.loss:
        step, loss = run.loss[-1]
        yield "loss", f"{loss:.4f} in iteration {step}"


def _is_own(found: WhatIf, run: RunData) -> bool:
    """Return whether a row has the run's own settings."""
    row, of = found.row, dict(run.settings)
    mode = TOLERANCE if "imbalance_tolerance" in of else of.get("plan_mode")
    return (row.strategy, row.mode, row.capacity) == (of.get("planner"), mode, run.shape.capacity)


def _equal_rows(rows: Sequence[WhatIf]) -> list[list[WhatIf]]:
    """Group rows of one capacity whose modes decided alike."""
    groups: dict[tuple[object, ...], list[WhatIf]] = {}
    for found in rows:
        row = found.row
        key = row.strategy, row.capacity, row.mean, row.p99, row.replan_share, row.layer_ms
        groups.setdefault(key, []).append(found)
    return list(groups.values())


def _line(
    equal: Sequence[WhatIf], own: WhatIf | None, run: RunData
) -> tuple[list[tuple[str, str]], str, bool]:
    """Return cells with their heads, the command, and whether this is the run's own setting."""
    row = equal[0].row
    is_own = any(found is own for found in equal)
    modes = ", ".join(found.mode for found in equal)
    cells = [
        ("setting", row.strategy if row.strategy == STOCK else f"C = {row.capacity}, {modes}"),
        ("max/mean", f"{row.mean:.3f}"),
        ("p99", f"{row.p99:.3f}"),
        ("fresh layouts", percent(row.replan_share)),
        ("ms per layer", f"{row.layer_ms:.3f}"),
    ]
    if own is not None:
        gain = row.layer_ms / own.row.layer_ms - 1
        cells.append(("against this run", "this run's" if is_own else f"{100 * gain:+.1f} %"))
    if run.shape.node_size < run.shape.num_ranks:
        cells.append(("off their node", percent(row.off_node_share)))
    return cells, (own if own is not None and is_own else equal[0]).command, is_own


def _advice(rows: Sequence[WhatIf], own: WhatIf | None) -> str:
    if own is None:
        return ""
    best = min(rows, key=lambda found: found.row.layer_ms)
    less = 1 - best.row.layer_ms / own.row.layer_ms
    if less < _WORTH_A_TRY:
        return (
            "Keep this run's settings: no other is predicted to take "
            f"{100 * _WORTH_A_TRY:.0f} % less time in MoE layers."
        )
    if best.row.strategy == STOCK:
        return f"Stock is predicted to take {percent(less)} less time in MoE layers."
    return (
        f"Try C = {best.row.capacity} and {best.mode}: {percent(less)} less time in MoE layers is "
        "predicted."
    )
