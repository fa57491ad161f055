"""Reader of a run's routing trace: one recording, or the folder that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_laer.files.checks import open_input
from megatron_laer.files.recording import is_cut_off
from megatron_laer.telemetry.trace_file import MAGIC
from megatron_laer.tools.traces.fsep import read_recording
from megatron_laer.tools.traces.records import Trace


def read_trace(
    path: Path,
    *,
    ranks: Sequence[int] | None = None,
    num_experts: int | None = None,
    pairs: bool = False,
) -> Trace:
    """Read a recording, or the only one in a folder.

    `ranks` are the source ranks to read, in this order. `num_experts` is compared with the
    recorded number. `pairs` of experts are read on request. Raises ValueError for a missing
    recording or damaged content, named by file and line or record.
    """
    if not path.exists():
        raise ValueError(f"trace {str(path)!r} does not exist; give a file or a folder")
    if path.is_dir():
        path = _recording_in(path)
    if (begin := _begin(path, 40))[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} begins with {begin!r}; give a recording of --fsep-record, or its folder"
        )
    trace = read_recording(path, pairs=pairs)
    if num_experts is not None and trace.num_experts != num_experts:
        raise ValueError(
            f"{path} has {trace.num_experts} experts, not {num_experts}; give the run's own model"
        )
    return trace if ranks is None else trace.of_ranks(ranks)


def _recording_in(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    recordings = [file for file in files if _is_recording(file)]
    if len(recordings) == 1:
        return recordings[0]
    if recordings:
        raise ValueError(
            f"{folder} holds the recordings of {len(recordings)} FSEP groups; give one, such as "
            f"{recordings[0]}"
        )
    raise ValueError(f"folder {folder} holds no trace: no recording of --fsep-record DIR trace")


def _is_recording(file: Path) -> bool:
    # Skip leftovers of a killed run, and steps that a later run repeated.
    if file.name.startswith(".") or is_cut_off(file):
        return False
    return _begin(file, len(MAGIC)) == MAGIC


def _begin(file: Path, count: int) -> bytes:
    with open_input(file) as content:
        return content.read(count)
