"""Bad inputs of `report`: the folders of runs, and the message expected for each."""

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
from tests.recorded_runs import record_run
from tests.records import put_together, records_of, taken_apart

HUGE = 2**36

_HEADERS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "version": ({"version": 9}, "version '9' of the format"),
    "few-slots": ({"capacity": 1}, "the slots of 4 ranks must hold each of 8"),
    "nodes": ({"node_size": 3}, "node size 3 does not divide the 4 ranks"),
    "more-layers": ({"layers": ["a", "b", "c"]}, "no record of its run begins there"),
    "other-columns": ({"of_steps": ["step"]}, "are another release's"),
}
# Texts of a record that describes a run.
_RUNS = {
    "text": ("hello", "record 1 at byte"),
    "list": ("[]", "record 1 at byte"),
    "nested": ("[" * 5000, "record 1 at byte"),
    "digits": ("9" * 5000, "record 1 at byte"),
    "no-cluster": ('{"run":{}}', "record 1 at byte"),
    "long-run": (json.dumps({"run": {"planner": "x" * 2000}}), "run must hold short texts by name"),
}

CASES = (
    ("", "required: RUN"),
    ("absent", "run 'absent' does not exist"),
    ("nothing", "folder 'nothing' holds no recording of a run; --fsep-record DIR metrics"),
    ("flipped.trace", "flipped.trace, record 1"),
    ("header-only.trace", "holds no complete record"),
    ("zeros.trace", "holds no tokens"),
    ("measured --group 7", "--group 7: 'measured' has recordings of the groups [0]"),
    ("measured --hours 1e-6 --cases 1000000", "stopped after the 1e-06 hours of --hours"),
    ("measured --cluster moon", "--cluster 'moon': unknown cluster"),
    ("measured --config tiny-moe", "--config 'tiny-moe': no effect on 'measured'"),
    ("measured --capacity 3", "--capacity '3': no effect on 'measured'"),
    ("measured --node-size 2", "--node-size '2': no effect on 'measured'"),
    ("measured --compare absent", "run 'absent' does not exist"),
    (
        "measured --out measured/group-0.metrics",
        "--out 'measured/group-0.metrics' would write over the input",
    ),
    (
        "measured --out measured/group-0.trace",
        "would write over the input 'measured/group-0.trace'",
    ),
    ("good.trace --compare measured --out measured/group-0.layouts", "would write over the input"),
    ("measured --out measured/group-1.metrics", "would be read as a file of the run the next time"),
    ("measured --out measured/new.log", "would be read as a file of the run the next time"),
    ("good.trace --out link.trace", "would write over the input 'good.trace'"),
    (
        "good.trace --out sizes-no-size.yaml --config sizes-no-size.yaml",
        "would write over the input",
    ),
    ("measured --out yaml-list.yaml --cluster yaml-list.yaml", "would write over the input"),
    ("good.trace --capacity 1", "--capacity 1: the slots of 4 ranks must hold each of 8"),
    ("good.trace --node-size 3", "--node-size 3 does not divide the 4 ranks"),
    ("good.trace --config gpt5", "--config 'gpt5'"),
    ("measured -- x", "nothing follows -- here, got x"),
    ("measured-empty", "are no header; give a recording of --fsep-record DIR metrics"),
    ("measured-half", "are no header; give a recording of --fsep-record DIR metrics"),
    ("measured-header", "measured-header/group-0.metrics holds no step yet"),
    ("measured-huge", "measured-huge/group-0.metrics, line 1"),
    ("measured-log", "measured-log/train.log, line 1: longer than 33,554,432 characters"),
    ("measured-ratio", "max_over_mean of 'layer 1' is -3, which is never below 1"),
    ("measured-pipe", "folder 'measured-pipe' holds no recording of a run"),
    ("measured-layouts", "measured-layouts/group-0.layouts, line 1"),
    ("measured-other-layouts", "they are of different runs, so move one away"),
    ("measured-trace", "measured-trace/group-0.trace, line 1"),
    ("measured-digit", "record 2 at byte"),
    *((f"measured-{name}", says) for name, (_, says) in (*_HEADERS.items(), *_RUNS.items())),
)


def make(folder: Path) -> None:
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
    copy("half", lines[0][:20])
    copy("header", b"".join(lines[:2]))
    os.truncate(METRICS.path(copy("huge", b"x"), 0), HUGE)
    (log := copy("log", metrics) / "train.log").touch()
    os.truncate(log, HUGE)
    ratio = content[1][2] | {"of_layers": np.full_like(content[1][2]["of_layers"], -3)}
    put_together(METRICS.path(copy("ratio", b""), 0), fields, [content[0], ("step", 0, ratio)])
    pipe = folder / "measured-pipe"
    pipe.mkdir()
    os.mkfifo(METRICS.path(pipe, 0))
    (copy("layouts", metrics) / "group-0.layouts").write_text("[1]\n")
    other = folder / "other"
    record_run(other, steps=2, layers=("layer 1",))
    shutil.copy(other / "group-0.layouts", copy("other-layouts", metrics) / "group-0.layouts")
    (copy("trace", metrics) / "group-0.trace").write_bytes(
        (good / "group-0.trace").read_bytes()[:30] + b"\n"
    )
    for name, (change, _) in _HEADERS.items():
        copy(name, header_line(METRICS.name, fields | dict(change)) + b"".join(lines[1:]))
    for name, (text, _) in _RUNS.items():
        run = ("run", 0, {"text": np.frombuffer(text.encode(), dtype=np.uint8)})
        put_together(METRICS.path(copy(name, b""), 0), fields, [run, *content[1:]])
    copy("digit", metrics[: -len(lines[-1]) - 1] + b"x" + metrics[-len(lines[-1]) :])
