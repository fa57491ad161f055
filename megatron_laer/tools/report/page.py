"""The page: one HTML file with its scripts, style and data.

The same data give the same bytes. jinja2 escapes all text from a run; within the data, `<`, `>`
and `&` are JSON escapes. The page's policy forbids the browser to load anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from megatron_laer.telemetry.metrics import LOGGED
from megatron_laer.tools.report.assessment import assess, percent, seconds
from megatron_laer.tools.report.figures import sections
from megatron_laer.tools.report.run_data import RunData
from megatron_laer.tools.report.what_if import WhatIf
from megatron_laer.tools.simulator.comparison import TOLERANCE
from megatron_laer.tools.simulator.node_rows import in_words
from megatron_laer.version import __version__

# Values of a what-if row in the page's data.
_OF_ROW = (
    *("strategy", "mode", "capacity", "cases", "mean", "p95", "p99"),
    *("off_node_share", "node_rows", "replan_share", "layer_ms"),
)
# Differs from the verdict's share by definition.
_OF_METRIC = {"fsep_share_of_forced_balance": " (of MoE layers, predicted while training)"}


def page(
    run: RunData, rows: Sequence[WhatIf], other: RunData | None = None, predicted_for: str = ""
) -> str:
    """Render the page; `predicted_for` describes the settings of the predictions in `rows`."""
    runs = [run] if other is None else [run, other]
    columns = [dict(_figures_of(one)) for one in runs]
    names = dict.fromkeys(name for one in columns for name in one)
    assessment = assess(run)
    shown = list(sections(run, assessment, other))
    data = {
        "format": "megatron_laer-report",
        "version": 2,
        "name": run.name,
        "is_measured": run.is_measured,
        "verdict": {
            name: getattr(assessment, name)
            for name in ("total_s", "imbalance_s", "exchanges_s", "stock_s", "kept")
        },
        "figures": [vars(figure) for section in shown for figure in section.figures],
        "what_if": [
            {name: getattr(row.row, name) for name in _OF_ROW}
            | {"share": row.share, "command": row.command}
            for row in rows
        ],
    }
    texts = resources.files("megatron_laer.tools.report") / "page"
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (texts / name).read_text(encoding="utf-8")),
    )
    return environment.get_template("page.html").render(
        name=run.name,
        about=_about(run),
        version=__version__,
        is_measured=run.is_measured,
        assessment=_capital(assessment.sentence()) + ".",
        causes=_capital(assessment.causes(run.shape.layers)),
        notes=run.notes,
        heads=["", *(one.name for one in runs)],
        key_figures=[(name, *(one.get(name, "–") for one in columns)) for name in names],
        sections=shown,
        what_if=[(_cells(row, run), row.command) for row in rows],
        predicted_for=f"Of {rows[0].row.cases} microbatches of one layer each, for {predicted_for}."
        if rows
        else "",
        settings=run.settings,
        data=_embedded(data),
        plotly=get_plotlyjs(),
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


def _figures_of(run: RunData) -> Iterator[tuple[str, str]]:
    assessment = assess(run)
    yield "steps", f"{len(run.steps_T)} ({run.steps_T[0]} to {run.steps_T[-1]})"
    of = "of whole steps, measured" if run.is_measured else "of MoE layers, predicted"
    yield f"share of forced balance {of}", percent(assessment.kept)
    what = "time of these steps" if run.is_measured else "predicted time of MoE layers"
    yield what, seconds(assessment.total_s)
    if run.is_measured and np.isfinite(run.of_steps["step_ms"]).any():
        median_ms = float(np.nanmedian(run.of_steps["step_ms"]))
        yield "step time, median", seconds(median_ms * 1e-3)
    yield "lost to imbalance", seconds(assessment.imbalance_s)
    if run.is_measured:
        yield "waits for exchanges and decisions", seconds(assessment.exchanges_s)
    yield "stock would have lost to imbalance", seconds(assessment.stock_s)
    for name, values in (
        ("max/mean tokens per rank", run.imbalance_TL),
        ("the same under stock's placement", run.stock_TL),
    ):
        there = values[np.isfinite(values)]
        if there.size:
            parts = [f"mean {there.mean():.3f}"]
            parts += [f"p{p} {np.percentile(there, p):.3f}" for p in (50, 95, 99)]
            yield name, ", ".join([*parts, f"max {there.max():.3f}"])
    for metric in LOGGED:
        logged = run.metrics.get(metric.name)
        if logged is not None and np.isfinite(logged).any() and not metric.over_layers:
            unit = f" {metric.unit}" if metric.unit else ""
            of = _OF_METRIC.get(metric.name, "")
            yield f"{metric.name}{of}, mean of steps", f"{np.nanmean(logged):.4g}{unit}"
    if run.loss:
        step, loss = run.loss[-1]
        yield "loss", f"{loss:.4f} at step {step}"


def _cells(found: WhatIf, run: RunData) -> list[tuple[str, str]]:
    row, of = found.row, dict(run.settings)
    mode = TOLERANCE if "imbalance_tolerance" in of else of.get("plan_mode")
    own = of.get("planner"), mode, run.shape.capacity
    is_own = run.is_measured and (row.strategy, row.mode, row.capacity) == own
    return [
        ("strategy", row.strategy),
        ("mode", f"{found.mode} (this run's)" if is_own else found.mode),
        ("C", str(row.capacity)),
        ("max/mean", f"{row.mean:.4f}"),
        ("p95", f"{row.p95:.4f}"),
        ("p99", f"{row.p99:.4f}"),
        ("off their node", percent(row.off_node_share)),
        ("rows between nodes: home - replicas - shared", in_words(row.node_rows)),
        ("fresh", percent(row.replan_share)),
        ("layer ms", f"{row.layer_ms:.3f}"),
        ("of forced balance, MoE layers", percent(found.share)),
    ]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
