"""Reader of a run's routing trace (`telemetry.trace_file`): one recording, or its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool
from megatron_laer.files import memory
from megatron_laer.files.checks import naming, open_input
from megatron_laer.files.records import Records, is_cut_off
from megatron_laer.telemetry.trace_file import TRACE
from megatron_laer.tools.traces.records import PairRecords, Trace

# A count takes 4 bytes, and 8 more where it is summed.
_BYTES_PER_COUNT = 12


def read_trace(
    path: Path,
    *,
    num_experts: int | None = None,
    pairs: bool = False,
) -> Trace:
    """Read a recording, or the only one in a folder.

    `num_experts` is compared with the recorded number. `pairs` of experts are read on request.
    Raises ValueError for a missing recording or damaged content, named by file and line or record.
    """
    if not path.exists():
        raise ValueError(f"trace {str(path)!r} does not exist; give a file or a folder")
    if path.is_dir():
        path = _recording_in(path)
    trace = read_recording(path, pairs=pairs)
    if num_experts is not None and trace.num_experts != num_experts:
        raise ValueError(
            f"{path} has {trace.num_experts} experts, not {num_experts}; give the run's own model"
        )
    return trace


def read_recording(path: Path, *, pairs: bool = False) -> Trace:
    """Read a recording of `TraceWriter`; an incomplete last record is skipped with a warning.

    Its `pairs`, with sets, are read on request: they may be many times as large as the counts.
    """
    counts: dict[tuple[int, int, int], npt.NDArray[np.unsignedinteger[Any]]] = {}
    triangles: dict[tuple[int, int], npt.NDArray[np.unsignedinteger[Any]]] = {}
    sets: dict[tuple[int, int], Bool] = {}
    with open_input(path) as file, naming(path):
        records = Records.of(file, path, TRACE)
        num_ranks, num_experts = (records.fields[name] for name in ("num_ranks", "num_experts"))
        kinds = None if pairs else ["counts"]
        for frame, values in records.read(file, path, kinds, must_have_one=True):
            key = frame.step, values["layer"]
            if frame.kind == "counts":
                counts[*key, values["microbatch"]] = values["counts_NE"]
            elif frame.kind == "pairs":
                triangles[key] = values["triangle"]
            else:
                chosen = np.unpackbits(values["bits"], axis=1, count=num_experts, bitorder="little")
                sets[key] = chosen.astype(bool)
    if not counts:
        raise ValueError(f"{path} holds no complete record; record at least two steps")
    memory.check_enough(
        _BYTES_PER_COUNT * len(counts) * num_ranks * num_experts,
        f"{len(counts)} records of {num_ranks} ranks and {num_experts} experts",
        "give a part of the trace",
    )
    keys_R3 = np.array(list(counts), dtype=np.int64)
    counts_RNE = np.empty((len(counts), num_ranks, num_experts), dtype=np.int32)
    for record, counts_NE in enumerate(counts.values()):
        counts_RNE[record] = counts_NE
    return Trace(
        tuple(records.fields["layers"]),
        keys_R3[:, 0],
        keys_R3[:, 1],
        keys_R3[:, 2],
        counts_RNE,
        PairRecords.of_triangles(triangles, num_experts),
        sets,
    )


def _recording_in(folder: Path) -> Path:
    # Without the steps that a later run repeated.
    files = sorted(folder.glob(f"*.{TRACE.suffix}"))
    recordings = [file for file in files if not is_cut_off(file)]
    if len(recordings) == 1:
        return recordings[0]
    if recordings:
        raise ValueError(
            f"{folder} holds the recordings of {len(recordings)} FSEP groups; give one, such as "
            f"{recordings[0]}"
        )
    raise ValueError(f"folder {folder} holds no trace: no recording of --fsep-record DIR trace")
