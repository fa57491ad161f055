"""The page is put together here: one file of HTML with its scripts, its style and its data.

The same data give the same bytes. Whatever comes from a run is escaped: in HTML by `html.escape`,
in the data by writing `<`, `>` and `&` as JSON escapes, and the scripts make text nodes of it. The
page may load nothing, and says so to the browser.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np

from megatron_laer.telemetry.metrics import LOGGED
from megatron_laer.tools.report.figures import figures
from megatron_laer.tools.report.run_data import RunData
from megatron_laer.tools.report.verdict import Verdict, judge, percent, seconds
from megatron_laer.tools.report.what_if import WhatIf

# In the order in which they are run.
SCRIPTS = ("drawing.js", "charts.js", "plots.js", "figures.js", "main.js")
_STYLE, _TEMPLATE = "style.css", "page.html"


def page(
    run: RunData, rows: Sequence[WhatIf], other: RunData | None = None, predicted_for: str = ""
) -> str:
    """Write the page.

    Args:
        rows: of other capacities and modes.
        predicted_for: the settings that these were predicted for, in words.
        other: a run to compare with.
    """
    verdict = judge(run)
    data: dict[str, Any] = {
        "format": "megatron_laer-report",
        "version": 1,
        "name": run.name,
        "is_measured": run.is_measured,
        "verdict": _numbers(verdict),
        **figures(run, verdict),
        "what_if": [asdict(row) for row in rows],
    }
    if other is not None:
        data["other"] = {
            "name": other.name,
            "is_measured": other.is_measured,
            "verdict": _numbers(judge(other)),
            **figures(other, judge(other)),
        }
    return _filled(
        {
            "TITLE": html.escape(run.name),
            "STYLE": _text(_STYLE),
            "VERDICT": html.escape(_capital(verdict.sentence()) + "."),
            "CAUSES": html.escape(
                _capital(cause) + "." if (cause := _causes(run, verdict)) else ""
            ),
            "NOTES": _list(run.notes),
            "NUMBERS": _table(
                ["", run.name, *([] if other is None else [other.name])], _key_figures(run, other)
            ),
            "WHAT_IF": _what_if_table(rows, predicted_for),
            "SETTINGS": _table(["setting", "value"], run.settings),
            "DATA": _embedded(data),
            "SCRIPTS": "\n".join(_text(name) for name in SCRIPTS),
        }
    )


def _filled(parts: Mapping[str, str]) -> str:
    """Fill the template; a part that looks like a place of the template stays as it is."""
    pieces = _text(_TEMPLATE).split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _text(name: str) -> str:
    return (resources.files("megatron_laer.tools.report") / "page" / name).read_text(
        encoding="utf-8"
    )


def _embedded(data: Mapping[str, Any]) -> str:
    """Write data as JSON that no text in it can end early."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _numbers(verdict: Verdict) -> dict[str, Any]:
    return {
        name: getattr(verdict, name)
        for name in ("total_s", "imbalance_s", "exchanges_s", "stock_s", "kept")
    }


def _causes(run: RunData, verdict: Verdict) -> str:
    return verdict.causes(run.shape.layers)


def _key_figures(run: RunData, other: RunData | None) -> list[tuple[str, ...]]:
    """Return rows of figures, with a column for each run."""
    columns = [dict(_figures_of(one)) for one in (run, other) if one is not None]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, *(column.get(name, "–") for column in columns)) for name in names]


def _figures_of(run: RunData) -> Iterable[tuple[str, str]]:
    verdict = judge(run)
    first, last = int(run.steps_T[0]), int(run.steps_T[-1])
    yield "steps", f"{len(run.steps_T)} ({first} to {last})"
    yield "share of forced balance", percent(verdict.kept)
    what = "time of these steps" if run.is_measured else "predicted time of MoE layers"
    yield what, seconds(verdict.total_s)
    if run.is_measured and np.isfinite(run.of_steps["step_ms"]).any():
        median_ms = float(np.nanmedian(run.of_steps["step_ms"]))
        yield "step time, median", seconds(median_ms * 1e-3)
    yield "lost to imbalance", seconds(verdict.imbalance_s)
    if run.is_measured:
        yield "waits for exchanges and decisions", seconds(verdict.exchanges_s)
    yield "stock would have lost to imbalance", seconds(verdict.stock_s)
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
            unit = "" if metric.unit == "1" else f" {metric.unit}"
            yield f"{metric.name}, mean of steps", f"{np.nanmean(logged):.4g}{unit}"
    if run.loss:
        step, loss = run.loss[-1]
        yield "loss", f"{loss:.4f} at step {step}"


def _what_if_table(rows: Sequence[WhatIf], predicted_for: str) -> str:
    if not rows:
        return "<p>No recorded routing to try this on, or none was asked for.</p>"
    heads = (
        *("strategy", "mode", "C", "max/mean", "p95", "p99", "off their node", "fresh"),
        *("layer ms", "of forced balance", "command"),
    )
    lines = [
        (
            *(row.strategy, row.mode, str(row.capacity)),
            *(f"{value:.4f}" for value in (row.mean, row.p95, row.p99)),
            *(percent(share) for share in (row.off_node_share, row.replan_share)),
            *(f"{row.layer_ms:.3f}", percent(row.share), row.command),
        )
        for row in rows
    ]
    of = f"Of {rows[0].cases} microbatches of one layer each, for {predicted_for}."
    return f"<p>{html.escape(of)}</p>\n" + _table(heads, lines, code_column=len(heads) - 1)


def _table(
    heads: Sequence[str], lines: Iterable[Sequence[str]], code_column: int | None = None
) -> str:
    """Write a table, whose first column names its lines."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = []
    for line in lines:
        cells = [f'<th scope="row">{html.escape(line[0])}</th>']
        for place, cell in enumerate(line[1:], start=1):
            text = html.escape(cell)
            cells.append(f"<td>{f'<code>{text}</code>' if place == code_column else text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    opened = '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
    return f"{opened}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _list(lines: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
