"""Reader of a routing trace of any format, which is recognized by its content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import open_input
from megatron_laer.files.recording import is_cut_off
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_file import MAGIC
from megatron_laer.tools.traces import csv_table, megatron, sets, smartmoe
from megatron_laer.tools.traces.fsep import read_recording
from megatron_laer.tools.traces.records import Trace

FORMATS = ("fsep", "megatron", "smartmoe", "npz", "csv", "sets")


def read_trace(
    path: Path,
    format: str | None = None,
    *,
    ranks: Sequence[int] | None = None,
    num_experts: int | None = None,
    pairs: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Trace:
    """Read a trace from a file, or a folder of one format; by default the format is recognized.

    `ranks` are the source ranks to read, in this order. `num_experts` is for formats that do not
    state it, and checked against the others. `pairs` of experts are read on request, from formats
    with them. Raises ValueError for an unknown format or damaged
    content, named by file and line or record.
    """
    if num_experts is not None and not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"the number of experts must be in 1..{MAX_EXPERTS}, got {num_experts}")
    if not path.exists():
        raise ValueError(f"trace {str(path)!r} does not exist; give a file or a folder")
    path, found = (path, format) if format is not None else _detect(path)
    if found == "megatron":
        return megatron.read_megatron(path, ranks, num_experts, progress, pairs=pairs)
    if found == "smartmoe":
        trace = smartmoe.read_smartmoe(path, ranks, progress)
        ranks = None
    elif found == "fsep":
        trace = read_recording(path, pairs=pairs)
    elif found == "npz":
        trace = smartmoe.read_npz(path)
    elif found == "csv":
        trace = csv_table.read_csv(path, num_experts)
    elif found == "sets":
        trace = sets.read_file_of_sets(path, num_experts)
    else:
        raise ValueError(f"unknown trace format {found!r}; use one of {', '.join(FORMATS)}")
    if num_experts is not None and trace.num_experts != num_experts:
        raise ValueError(
            f"{path} has {trace.num_experts} experts, not {num_experts} as --experts or --config "
            "say"
        )
    return trace if ranks is None else trace.of_ranks(ranks)


def _detect(path: Path) -> tuple[Path, str]:
    """Return the path of a trace and its format; for a folder with one recording, that file."""
    if path.is_dir():
        return _detect_folder(path)
    with open_input(path) as file:
        begin = file.read(4096)
    if begin.startswith(MAGIC):
        return path, "fsep"
    if begin.startswith(b"PK\x03\x04"):
        return path, "npz"
    if begin.lstrip().startswith(b"{"):
        return path, "megatron"
    first_line = begin.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    if b"," in first_line and b"step" in first_line:
        return path, "csv"
    if begin.startswith(sets.GZIP) or sets.is_set(first_line):
        return path, "sets"
    if smartmoe.FILE_NAME.fullmatch(path.name):
        raise ValueError(f"{path} is one file of many; give the folder that it is in")
    raise ValueError(
        f"{path} begins with {begin[:40]!r}, which no trace format does; they are "
        f"{', '.join(FORMATS)}, and --format names one"
    )


def _detect_folder(path: Path) -> tuple[Path, str]:
    files = sorted(file for file in path.iterdir() if file.is_file())
    if any(megatron.FILE_NAME.fullmatch(file.name) for file in files):
        return path, "megatron"
    if any(smartmoe.FILE_NAME.fullmatch(file.name) for file in files):
        return path, "smartmoe"
    recordings = [file for file in files if _is_recording(file)]
    if len(recordings) == 1:
        return recordings[0], "fsep"
    if recordings:
        raise ValueError(
            f"{path} holds the recordings of {len(recordings)} FSEP groups; give one, such as "
            f"{recordings[0]}"
        )
    raise ValueError(
        f"folder {path} holds no trace: no router_trace_rank*.jsonl, no table_iter*_rank*.log and "
        "no recording of --fsep-record-trace"
    )


def _is_recording(file: Path) -> bool:
    # Skip leftovers of a killed run, and steps that a later run repeated.
    if file.name.startswith(".") or is_cut_off(file):
        return False
    with open_input(file) as content:
        return content.read(len(MAGIC)) == MAGIC
