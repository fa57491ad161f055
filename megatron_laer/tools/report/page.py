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

from megatron_laer.telemetry.log import in_words
from megatron_laer.telemetry.metrics import LOGGED
from megatron_laer.tools.report.assessment import assess, percent, seconds
from megatron_laer.tools.report.figures import measured_over_predicted, sections
from megatron_laer.tools.report.metrics_recording import Float64
from megatron_laer.tools.report.recorded import RunData
from megatron_laer.tools.report.run_files import ranges
from megatron_laer.tools.report.what_if import WhatIf
from megatron_laer.tools.simulator.comparison import STOCK, TOLERANCE, PlanRow
from megatron_laer.version import __version__

_FOLDER = resources.files("megatron_laer.tools.report") / "page"
# Values of the assessment and of a what-if row in the page's data.
_OF_VERDICT = ("kept", "kept_by_stock", "total_s", "imbalance_s", "exchanges_s", "stock_s")
_OF_ROW = (
    *("strategy", "mode", "capacity", "cases", "mean", "p99"),
    *("off_node_share", "replan_share", "layer_ms"),
)
_VERIFIED = "fsep_verified"
# Without a mean over steps: a number since the start, and another quantity than the verdict's share
# of balance, of nearly the same name: of MoE layers alone, and predicted.
_LEFT_OUT = (_VERIFIED, "fsep_share_of_forced_balance")
# From which gain on another setting is worth a try.
_WORTH_A_TRY = 0.02


def page(run: RunData, rows: Sequence[WhatIf], predicted_for: str = "") -> str:
    """Render the page; `predicted_for` describes the settings of the predictions in `rows`."""
    assessment = assess(run, run.logs)
    shown = list(sections(run))
    data = {
        "format": "megatron_laer-report",
        "version": 4,
        "name": run.name,
        "verdict": {name: getattr(assessment, name) for name in _OF_VERDICT},
        "figures": [vars(figure) for section in shown for figure in section.figures],
        "layers": next((f.choices for of in shown for f in of.figures if f.choices), ()),
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
        verdict=f"{assessment.sentence()}.",
        causes=assessment.causes(run.shape.layers),
        notes=run.notes,
        six=list(_six_numbers(run)),
        all_numbers=list(_all_numbers(run)),
        sections=shown,
        menu=next((of.id for of in shown if any(f.choices for f in of.figures)), ""),
        what_if=[_line(equal, own, run) for equal in _equal_rows(rows)],
        advice=_advice(rows, own),
        fit=measured_over_predicted(run),
        predicted_for=_predicted_for(run, rows[0].row.cases, predicted_for) if rows else "",
        settings=run.settings,
        data=_embedded(data),
        plotly=base64.b64encode((_FOLDER / "plotly-cartesian.min.js.gz").read_bytes()).decode(),
    )


def _predicted_for(run: RunData, cases: int, settings: str) -> str:
    """Describe the cases, and the share of a step that they are of."""
    took = (
        f", which took {percent(share)} of this run's steps" if (share := _moe_share(run)) else ""
    )
    steps = [step for step in run.traced[1:] if step + 1 in run.logs.iterations]
    return (
        f"Layers' times are predicted{took}. Of {cases} microbatches of one layer each, in the "
        f"{ranges(steps or run.traced[1:])}, for {settings}."
    )


def _moe_share(run: RunData) -> float:
    """Return the share of steps that MoE layers took; 0 if it is not known."""
    of = run.during(run.logs.iterations)
    step_ms = float(np.nansum(of.of_steps["step_ms"]))
    share = float(np.nansum(of.layer_ms_TL)) / step_ms if step_ms > 0 else 0.0
    return share if share < 1 else 0.0


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
    assessment, of = assess(run, run.logs), run.during(run.logs.iterations)
    when = in_words(run.logs.iterations)
    if (found := run.logs.measured) is not None:
        times = seconds(found.stock_ms * 1e-3), seconds(found.own_ms * 1e-3)
        logs = f"{', '.join(found.own_logs)} and in {found.stock_log}"
        yield *times, f"a step, median of the {when} in {logs}"
    means = _mean(of.stock_TL), _mean(of.imbalance_TL)
    yield *means, f"max/mean tokens per rank, mean of the {when}"
    shares = percent(assessment.kept_by_stock), percent(assessment.kept)
    yield *shares, f"of perfectly balanced speed in the {when}; stock's is an estimate"
    lost = seconds(assessment.stock_s), seconds(assessment.imbalance_s)
    yield *lost, f"lost to imbalance, of {seconds(assessment.total_s)} in the {when}"


def _mean(values: Float64) -> str:
    there = values[np.isfinite(values)]
    return f"{there.mean():.3f}" if there.size else "–"


def _all_numbers(run: RunData) -> Iterator[tuple[str, str]]:
    of = run.during(run.logs.iterations)
    yield "iterations", f"{len(run.steps_T)} ({run.iterations_T[0]} to {run.iterations_T[-1]})"
    yield "of which averaged here", in_words(run.logs.iterations)
    if np.isfinite(of.of_steps["step_ms"]).any():
        median_ms = float(np.nanmedian(of.of_steps["step_ms"]))
        yield "step time, median", seconds(median_ms * 1e-3)
    yield "waits for exchanges and decisions", seconds(assess(run, run.logs).exchanges_s)
    for name, values in (
        ("max/mean tokens per rank", of.imbalance_TL),
        ("the same under stock's placement", of.stock_TL),
    ):
        there = values[np.isfinite(values)]
        if there.size:
            parts = [f"p{p} {np.percentile(there, p):.3f}" for p in (50, 95, 99)]
            yield name, ", ".join([*parts, f"max {there.max():.3f}"])
    for metric in LOGGED:
        logged = of.metrics.get(metric.name)
        if metric.over_layers or metric.name in _LEFT_OUT or logged is None:
            continue
        if np.isfinite(logged).any():
            unit = f" {metric.unit}" if metric.unit else ""
            yield f"{metric.name}, mean of steps", f"{np.nanmean(logged):.4g}{unit}"
    verified = run.metrics.get(_VERIFIED)
    if verified is not None and np.isfinite(verified[-1]):
        yield "exchanges verified since the last start", f"{verified[-1]:,.0f}, all right"
    if run.logs.loss:
        step, loss = run.logs.loss[-1]
        yield "loss", f"{loss:.4f} in iteration {step}"


def _is_own(found: WhatIf, run: RunData) -> bool:
    """Return whether a row has the run's own settings."""
    row, of = found.row, dict(run.settings)
    mode = TOLERANCE if "imbalance_tolerance" in of else of.get("plan_mode")
    return (row.strategy, row.mode, row.capacity) == (of.get("planner"), mode, run.shape.capacity)


def _equal_rows(rows: Sequence[WhatIf]) -> list[list[WhatIf]]:
    """Group rows that show the same numbers."""
    groups: dict[tuple[object, ...], list[WhatIf]] = {}
    for found in rows:
        key = found.row.strategy, *_numbers(found.row)
        groups.setdefault(key, []).append(found)
    return list(groups.values())


def _numbers(row: PlanRow) -> list[tuple[str, str]]:
    """Return the cells of a row's own numbers, with their heads."""
    return [
        ("max/mean", f"{row.mean:.3f}"),
        ("p99", f"{row.p99:.3f}"),
        ("fresh layouts", percent(row.replan_share)),
        ("ms per layer", digits(row.layer_ms)),
        ("off their node", percent(row.off_node_share)),
    ]


def digits(value: float) -> str:
    """Return a number of up to four digits, whole from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def _line(
    equal: Sequence[WhatIf], own: WhatIf | None, run: RunData
) -> tuple[list[tuple[str, str]], str, bool]:
    """Return cells with their heads, the command, and whether this is the run's own setting."""
    row = equal[0].row
    is_own = any(found is own for found in equal)
    *numbers, off_node = _numbers(row)
    cells = [("setting", row.strategy if row.strategy == STOCK else _settings(equal)), *numbers]
    if own is not None:
        # Of a step, if it is known how much of it layers take.
        share = _moe_share(run)
        more = (share or 1.0) * (row.layer_ms / own.row.layer_ms - 1)
        of = "step" if share else "MoE time"
        cells.append((f"{of} against this run", "this run's" if is_own else f"{100 * more:+.1f} %"))
    if run.shape.node_size < run.shape.num_ranks:
        cells.append(off_node)
    return cells, (own if own is not None and is_own else equal[0]).command, is_own


def _settings(equal: Sequence[WhatIf]) -> str:
    """Name the capacities and modes of some rows; capacities with the same modes as one."""
    modes_of: dict[int, list[str]] = {}
    for found in equal:
        modes_of.setdefault(found.row.capacity, []).append(found.mode)
    of_modes: dict[str, list[str]] = {}
    for capacity, modes in modes_of.items():
        of_modes.setdefault(", ".join(modes), []).append(str(capacity))
    return "; ".join(f"C = {' and '.join(of)}, {modes}" for modes, of in of_modes.items())


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
