"""Bad inputs of `report`: the folders of runs, and the message expected for each."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_laer.telemetry.metrics_file import recording_path
from tests import fuzz
from tests.recorded_runs import RUN_NUMBER, record_run

HUGE = 2**36

_HEADERS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "version": ({"version": 9}, "version '9' of the format"),
    "no-ranks": ({"num_ranks": 0}, "num_ranks must be an integer in 1.."),
    "true-ranks": ({"num_ranks": True}, "num_ranks must be an integer in 1.."),
    "huge-ranks": ({"num_ranks": 10**40}, "num_ranks must be an integer in 1.."),
    "few-slots": ({"capacity": 1}, "the slots of 4 ranks must hold each of 8"),
    "nodes": ({"node_size": 3}, "node size 3 does not divide the 4 ranks"),
    "no-layers": ({"layers": []}, "layers must be names of at least one layer"),
    "null-layers": ({"layers": None}, "layers must be names of at least one layer, got 'None'"),
    "more-layers": ({"layers": ["a", "b", "c"]}, "must have a number for each of 3 layers"),
    "other-key": ({"more": 1}, "has the keys"),
}
# Replacements of its third line, which is the first step.
_STEPS = {
    "text": ("hello", "line 3: not JSON"),
    "list": ("[]", "line 3: expected an object, got '[]'"),
    "nested": ("[" * 5000, "line 3: not JSON"),
    "digits": ("9" * 5000, "line 3"),
    "no-step": ('{"record":2,"more":1}', "line 3: step 'None' is no step"),
    "negative": ('{"record":2,"step":-1}', "line 3: step '-1' is no step"),
    "long-run": (
        json.dumps({"record": 2, "step": 0, "run": {"planner": "x" * 2000}}),
        "line 3: run must hold short texts by name",
    ),
    "escape": ('{"record":2,"step":"\\u001b[31m"}', "line 3: step '\\x1b[31m' is no step"),
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
        "measured --out measured/metrics-0.jsonl",
        "--out 'measured/metrics-0.jsonl' would write over the input",
    ),
    (
        "measured --out measured/group-0.trace",
        "would write over the input 'measured/group-0.trace'",
    ),
    ("good.trace --compare measured --out measured/group-0.jsonl", "would write over the input"),
    ("measured --out measured/metrics-1.jsonl", "would be read as a file of the run the next time"),
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
    ("measured-empty", "measured-empty/metrics-0.jsonl holds no whole line"),
    ("measured-half", "measured-half/metrics-0.jsonl holds no whole line"),
    ("measured-header", "measured-header/metrics-0.jsonl holds no step yet"),
    ("measured-huge", "measured-huge/metrics-0.jsonl, line 1: has more than"),
    ("measured-log", "measured-log/train.log, line 1: longer than 33,554,432 characters"),
    ("measured-twice", "'measured-twice/metrics-00.jsonl' are both of group 0; move one away"),
    ("measured-ratio", "max_over_mean of 'layer 1' is -3, which is never below 1"),
    ("measured-pipe", "folder 'measured-pipe' holds no recording of a run"),
    ("measured-layouts", "measured-layouts/group-0.jsonl, line 1"),
    ("measured-other-layouts", "they are of different runs, so move one away"),
    ("measured-trace", "measured-trace/group-0.trace begins with"),
    ("measured-digit", "line 3: its checksum does not fit"),
    *((f"measured-{name}", says) for name, (_, says) in (*_HEADERS.items(), *_STEPS.items())),
)


def make(folder: Path) -> None:
    good = folder / "measured"
    record_run(good, steps=2)
    metrics = recording_path(good, 0).read_bytes()
    lines = metrics.splitlines(keepends=True)
    header = json.loads(lines[0])
    del header["crc"]

    def copy(name: str, content: bytes) -> Path:
        run = folder / f"measured-{name}"
        run.mkdir()
        recording_path(run, 0).write_bytes(content)
        return run

    copy("empty", b"")
    copy("half", lines[0][:20])
    copy("header", b"".join(lines[:2]))
    os.truncate(recording_path(copy("huge", b"x"), 0), HUGE)
    (log := copy("log", metrics) / "train.log").touch()
    os.truncate(log, HUGE)
    (copy("twice", metrics) / "metrics-00.jsonl").write_bytes(metrics)
    step = re.sub(r'"max_over_mean":\[[^,]*', '"max_over_mean":[-3', lines[2].decode())
    copy("ratio", b"".join(lines[:2]) + fuzz.resealed(step, RUN_NUMBER).encode())
    pipe = folder / "measured-pipe"
    pipe.mkdir()
    os.mkfifo(recording_path(pipe, 0))
    (copy("layouts", metrics) / "group-0.jsonl").write_text("[1]\n")
    other = folder / "other"
    record_run(other, steps=2, layers=("layer 1",))
    shutil.copy(other / "group-0.jsonl", copy("other-layouts", metrics) / "group-0.jsonl")
    (copy("trace", metrics) / "group-0.trace").write_bytes(
        (good / "group-0.trace").read_bytes()[:30] + b"\n"
    )
    for name, (change, _) in _HEADERS.items():
        first = fuzz.resealed(json.dumps(header | dict(change))).encode()
        copy(name, first + b"\n" + b"".join(lines[1:]))
    for name, (text, _) in _STEPS.items():
        third = fuzz.resealed(text, RUN_NUMBER) if text.startswith('{"') else text
        copy(name, b"".join(lines[:2]) + third.encode() + b"\n" + b"".join(lines[3:]))
    copy("digit", metrics.replace(b'"max_over_mean":[1', b'"max_over_mean":[2', 1))
