"""Recordings and other files that are whole, and contradict themselves or one another.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.state import STATE
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.bad_inputs.case import Case
from tests.recorded_runs import RUN_NUMBER, record_run
from tests.traces import pairs_of

_TOKENS = np.array([[0, 1], [0, 2], [1, 2], [4, 5], [4, 6], [5, 6], [3, 7]])
_PAIRS_EE = pairs_of(_TOKENS, 8)
_SETS_TE = np.eye(8, dtype=np.bool_)[_TOKENS].any(axis=1)


def _with(one: int, other: int, tokens: int) -> Int64:
    changed_EE = _PAIRS_EE.copy()
    changed_EE[one, other] = changed_EE[other, one] = tokens
    return changed_EE


# Pairs and sets of the last layer in the last step, and what `plan --homes` says.
_ENDS: Mapping[str, tuple[Int64 | None, Bool | None, str]] = {
    "layer": (None, None, "layer 2 has no pairs of experts; record it with the others"),
    "sets-alone": (None, _SETS_TE, "step 1, layer 2: sets need pairs of the same step"),
    "twice": (2 * _PAIRS_EE, None, "pairs and counts must have the same tokens of each expert"),
    "more": (_with(0, 4, 1), None, "pairs must be those of tokens that have as many experts each"),
    "single": (
        np.diag(_PAIRS_EE.diagonal()),
        None,
        "pairs must be those of tokens that have as many experts each",
    ),
    "fewer": (_with(0, 1, 0), None, "pairs must be those of tokens that have as many experts each"),
    "no-set": (_PAIRS_EE, _SETS_TE & False, "each set must have 2 experts, as the pairs say"),
    "all-set": (_PAIRS_EE, _SETS_TE | True, "each set must have 2 experts, as the pairs say"),
    "other": (_PAIRS_EE, np.roll(_SETS_TE, 1, axis=1), "sets must be of tokens that are in the pa"),
    "often": (_PAIRS_EE, np.tile(_SETS_TE, (2, 1)), "sets must be of tokens that are in the pairs"),
}
_HOMES = {
    "nested": (b"[" * 10**5, "must be a file of homes: not JSON; it is nested too deeply"),
    "metrics": (
        b'{"format":"megatron_laer-metrics"}',
        'it begins with \'{"format":"megatron_laer-metrics"}\'; give a file of homes',
    ),
}


def make(folder: Path) -> None:
    from torch.distributed.checkpoint import metadata

    for name, (pairs_EE, sets_TE, _) in _ENDS.items():
        writer = _begun(folder / f"pairs-{name}.trace", has_first=name != "layer")
        if pairs_EE is not None:
            writer.append_pairs(1, 1, pairs_EE)
        if sets_TE is not None:
            writer.append_sets(1, 1, sets_TE)
        writer.close()
    for name, (content, _) in _HOMES.items():
        (folder / f"homes-{name}.json").write_bytes(content)
    record_run(folder / "measured-another", steps=2, number=RUN_NUMBER[::-1])
    for name in ("trace", "layouts"):
        mixed = folder / f"measured-mixed-{name}"
        shutil.copytree(folder / "measured", mixed)
        shutil.copy(folder / "measured-another" / f"group-0.{name}", mixed)
    state = folder / "checkpoint-state"
    (state / "fsep_planner").mkdir(parents=True)
    (state / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (state / ".metadata").write_bytes(pickle.dumps(metadata.Metadata({})))
    damaged = STATE.magic + bytes([255] * 64)
    (state / "fsep_planner" / "group-0.bin").write_bytes(damaged)


def _begun(path: Path, *, has_first: bool = True) -> TraceWriter:
    """Begin a recording of two layers and steps, whose last pairs or the layer's are missing."""
    writer = TraceWriter(path, 2, 8, ["layer 1", "layer 2"])
    for step in range(2):
        for layer in range(2):
            writer.append(step, layer, 0, np.stack([_PAIRS_EE.diagonal(), 0 * _PAIRS_EE[0]]))
        for layer in range(2 if has_first and step == 0 else 1):
            writer.append_pairs(step, layer, _PAIRS_EE)
    return writer


def cases() -> Iterator[Case]:
    homes = "--node-size 1 --homes".split()
    for name, (_, _, says) in _ENDS.items():
        yield Case(("plan", f"pairs-{name}.trace", *homes, "out/x.json"), says)
    for name, (_, says) in _HOMES.items():
        yield Case(("plan", "pairs-layer.trace", *homes, f"homes-{name}.json"), says)
    for name in ("trace", "layouts"):
        says = "they are of different runs, so move one away"
        yield Case(("report", f"measured-mixed-{name}"), says)
    yield Case(("plan", "measured-mixed-trace/group-0.trace"), "of different runs, so move one")
    says = "are no header; give a planner's state"
    yield Case(("inspect", "checkpoint-state"), says, status=1)
