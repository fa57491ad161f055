"""Recordings and other files that are whole, and contradict themselves or one another.

Legend: E experts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.files.records import header_line
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.bad_inputs.inputs import HUGE
from tests.recorded_runs import RUN_NUMBER, record_run
from tests.records import put_together, records_of, taken_apart
from tests.traces import pairs_of

_TOKENS = np.array([[0, 1], [0, 2], [1, 2], [4, 5], [4, 6], [5, 6], [3, 7]])
_PAIRS_EE = pairs_of(_TOKENS, 8)
# Changed fields of a header, and texts of a record that describes a run.
_HEADERS: Mapping[str, Mapping[str, Any]] = {
    "version": {"version": 9},
    "few-slots": {"capacity": 1},
    "nodes": {"node_size": 3},
}
_RUNS = {
    "no-cluster": '{"run":{}}',
    "long-run": json.dumps({"run": {"planner": "x" * 2000}}),
}


def make(folder: Path) -> None:
    writer = TraceWriter(folder / "pairs-layer.trace", 2, 8, ["layer 1", "layer 2"])
    for step, layer in ((0, 0), (0, 1), (1, 0), (1, 1)):
        writer.append(step, layer, 0, np.stack([_PAIRS_EE.diagonal(), 0 * _PAIRS_EE[0]]))
        if layer == 0:
            writer.append_pairs(step, layer, _PAIRS_EE)
    writer.close()
    good = folder / "measured"
    record_run(good, steps=2)
    metrics = METRICS.path(good, 0).read_bytes()
    fields, content = taken_apart(METRICS.path(good, 0))
    lines = records_of(METRICS.path(good, 0))

    def copy(name: str, content: bytes) -> Path:
        run = folder / f"measured-{name}"
        run.mkdir()
        METRICS.path(run, 0).write_bytes(content)
        return run

    copy("empty", b"")
    copy("header", b"".join(lines[:2]))
    os.truncate(METRICS.path(copy("huge", b"x"), 0), HUGE)
    (log := copy("log", metrics) / "train.log").touch()
    os.truncate(log, HUGE)
    (folder / "measured-pipe").mkdir()
    os.mkfifo(METRICS.path(folder / "measured-pipe", 0))
    (copy("layouts", metrics) / "group-0.layouts").write_text("[1]\n")
    (copy("trace", metrics) / "group-0.trace").write_bytes(
        (good / "group-0.trace").read_bytes()[:30] + b"\n"
    )
    for name, change in _HEADERS.items():
        copy(name, header_line(METRICS.name, fields | dict(change)) + b"".join(lines[1:]))
    for name, text in _RUNS.items():
        run = ("run", 0, {"text": np.frombuffer(text.encode(), dtype=np.uint8)})
        put_together(METRICS.path(copy(name, b""), 0), fields, [run, *content[1:]])
    record_run(folder / "measured-another", steps=2, number=RUN_NUMBER[::-1])
    mixed = shutil.copytree(good, folder / "measured-mixed")
    shutil.copy(folder / "measured-another" / "group-0.trace", mixed)
