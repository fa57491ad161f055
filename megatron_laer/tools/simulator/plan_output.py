"""The rows of `plan` as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laer.files.writing import write_output
from megatron_laer.tools.simulator.comparison import STOCK, PlanRow
from megatron_laer.tools.simulator.rendering import aligned

_MIB = 2**20
_COLUMNS = (
    ("strategy", lambda row: row.strategy),
    ("mode", lambda row: row.mode),
    ("C", lambda row: f"{row.capacity}"),
    ("split", lambda row: row.split),
    ("mean", lambda row: f"{row.mean:.4f}"),
    ("p95", lambda row: f"{row.p95:.4f}"),
    ("p99", lambda row: f"{row.p99:.4f}"),
    ("max", lambda row: f"{row.max:.3f}"),
    ("load/bound", lambda row: f"{row.load_over_bound:.4f}"),
    ("off-node", lambda row: f"{row.off_node_share:.1%}"),
    ("replans", lambda row: f"{row.replan_share:.1%}"),
    ("plan ms", lambda row: f"{row.plan_ms:.3f}"),
    ("gate ms", lambda row: f"{row.gate_ms:.3f}"),
    ("restored MiB", lambda row: f"{row.restored_bytes / _MIB:.1f}"),
    ("layer ms", lambda row: f"{row.layer_ms:.3f}"),
    ("time/bound", lambda row: f"{row.time_over_bound:.3f}"),
)
_WORDS = (0, 1, 3)  # columns of text

LEGEND = """\
mean, p95, p99, max: of max/mean tokens per rank. load/bound: largest load / ceil(tokens/N), mean.
off-node: tokens computed on another node than their own. replans: microbatches whose layout was
made after the gate. plan ms: a planned layout, in the background; gate ms: split and guard, on the
critical path; both measured here, medians. restored MiB: received by the busiest rank in one
forward pass. layer ms: predicted, forward and backward, with the cost of replans, and of home
experts' replicas as far as it is not hidden; rows are taken to be restored unseen, and stock's
tokens go by rank. time/bound: the same / a lower bound for C slots."""


def table_text(rows: Sequence[PlanRow]) -> str:
    head = [name for name, _ in _COLUMNS]
    return aligned([head, *([text(row) for _, text in _COLUMNS] for row in rows)], _WORDS)


def shortest(rows: Sequence[PlanRow]) -> str:
    """Name the row with the shortest layer, and its gain over stock, if that is a row."""
    best, first = min(rows, key=lambda row: row.layer_ms), rows[0]
    named = best.strategy if best.mode == "-" else f"{best.strategy} {best.mode}"
    found = f"Shortest layer: {named}, C = {best.capacity}, {best.layer_ms:.3f} ms"
    if first.strategy != STOCK or best is first:
        return f"{found}."
    return (
        f"{found}, {first.layer_ms / best.layer_ms:.2f} times as fast as stock EP; max/mean tokens "
        f"per rank {best.mean:.3f}, where stock EP has {first.mean:.3f}."
    )


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[PlanRow]) -> None:
    content = {**about, "rows": [asdict(row) for row in rows]}
    write_output(path, json.dumps(content, indent=1) + "\n", "--json")
