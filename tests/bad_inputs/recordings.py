"""Recordings and other files that are whole, and contradict themselves or one another.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.files.records import header_line
from megatron_laer.planner.state import STATE
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.bad_inputs.case import Case
from tests.bad_inputs.inputs import HUGE
from tests.recorded_runs import RUN_NUMBER, record_run
from tests.records import put_together, records_of, taken_apart
from tests.traces import pairs_of

_TOKENS = np.array([[0, 1], [0, 2], [1, 2], [4, 5], [4, 6], [5, 6], [3, 7]])
_PAIRS_EE = pairs_of(_TOKENS, 8)
_SETS_TE = np.eye(8, dtype=np.bool_)[_TOKENS].any(axis=1)


def _with(one: int, other: int, tokens: int) -> Int64:
    changed_EE = _PAIRS_EE.copy()
    changed_EE[one, other] = changed_EE[other, one] = tokens
    return changed_EE


_AS_MANY = "pairs must be those of tokens that have as many experts each"
# Pairs and sets of the last layer in the last step, and what `plan --homes` says.
_ENDS: Mapping[str, tuple[Int64 | None, Bool | None, str]] = {
    "layer": (None, None, "layer 2 has no pairs of experts; record it with the others"),
    "sets-alone": (None, _SETS_TE, "step 1, layer 2: sets need pairs of the same step"),
    "twice": (2 * _PAIRS_EE, None, "pairs and counts must have the same tokens of each expert"),
    "more": (_with(0, 4, 1), None, _AS_MANY),
    "single": (np.diag(_PAIRS_EE.diagonal()), None, _AS_MANY),
    "fewer": (_with(0, 1, 0), None, _AS_MANY),
    "no-set": (_PAIRS_EE, _SETS_TE & False, "each set must have 2 experts, as the pairs say"),
    "all-set": (_PAIRS_EE, _SETS_TE | True, "each set must have 2 experts, as the pairs say"),
    "other": (_PAIRS_EE, np.roll(_SETS_TE, 1, axis=1), "sets must be of tokens that are in the pa"),
    "often": (_PAIRS_EE, np.tile(_SETS_TE, (2, 1)), "sets must be of tokens that are in the pairs"),
}
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


def cases() -> Iterator[Case]:
    for name, (_, _, says) in _ENDS.items():
        words = ("plan", f"pairs-{name}.trace", *"--node-size 1 --homes out/x.json".split())
        yield Case(words, says)
    says = "are no header; give a planner's state"
    yield Case(("inspect", "checkpoint-state"), says, status=1)


def make(folder: Path) -> None:
    for name, (pairs_EE, sets_TE, _) in _ENDS.items():
        writer = _begun(folder / f"pairs-{name}.trace", has_first=name != "layer")
        if pairs_EE is not None:
            writer.append_pairs(1, 1, pairs_EE)
        if sets_TE is not None:
            writer.append_sets(1, 1, sets_TE)
        writer.close()
    _runs(folder)

    from torch.distributed.checkpoint import metadata

    state = folder / "checkpoint-state"
    (state / "fsep_planner").mkdir(parents=True)
    (state / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (state / ".metadata").write_bytes(pickle.dumps(metadata.Metadata({})))
    (state / "fsep_planner" / "group-0.bin").write_bytes(STATE.magic + bytes([255] * 64))


def _begun(path: Path, *, has_first: bool = True) -> TraceWriter:
    """Begin a recording of two layers and steps, whose last pairs or the layer's are missing."""
    writer = TraceWriter(path, 2, 8, ["layer 1", "layer 2"])
    for step in range(2):
        for layer in range(2):
            writer.append(step, layer, 0, np.stack([_PAIRS_EE.diagonal(), 0 * _PAIRS_EE[0]]))
        for layer in range(2 if has_first and step == 0 else 1):
            writer.append_pairs(step, layer, _PAIRS_EE)
    return writer


def _runs(folder: Path) -> None:
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
    ratio = content[1][2] | {"of_layers": np.full_like(content[1][2]["of_layers"], -3)}
    put_together(METRICS.path(copy("ratio", b""), 0), fields, [content[0], ("step", 0, ratio)])
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
