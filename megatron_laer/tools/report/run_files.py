"""Files of a run, found by their names in one folder; only their runs' numbers are read.

Names alone identify the files, so no output in a run's folder may have such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_laer.files.checks import quoted
from megatron_laer.files.recording import run_of
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE

_WAYS = "give one that --fsep-record DIR metrics trace layouts wrote"


@dataclass(frozen=True)
class RunFiles:
    """Files of one FSEP group; `groups` are all groups with metrics."""

    name: str
    group: int
    groups: tuple[int, ...]
    metrics: Path
    trace: Path | None = None
    layouts: Path | None = None
    logs: tuple[Path, ...] = ()

    def all_files(self) -> list[Path]:
        recordings = (self.metrics, self.trace, self.layouts)
        return [file for file in (*recordings, *self.logs) if file is not None]


def find_run(given: Path, group: int | None) -> RunFiles:
    """Find the files of a run; without `group`, those of the first group.

    Raises ValueError if no metrics are there (of this group), or its recordings are of two runs.
    """
    if not given.exists():
        raise ValueError(f"run {quoted(given)} does not exist; give a folder")
    if not given.is_dir():
        raise ValueError(f"run {quoted(given)} is no folder; {_WAYS}. `plan` replays a trace alone")
    found = _recordings(given)
    groups = [of for of, files in sorted(found.items()) if METRICS.suffix in files]
    if not groups:
        raise ValueError(f"folder {quoted(given)} holds no metrics of a run; {_WAYS}")
    chosen = groups[0] if group is None else group
    if chosen not in groups:
        raise ValueError(
            f"--group {chosen}: {quoted(given)} has metrics of the groups {groups}; give one"
        )
    _check_one_run(found[chosen].values())
    logs = tuple(
        path for path in sorted(given.iterdir()) if _LOG.fullmatch(path.name) and path.is_file()
    )
    return RunFiles(str(given), chosen, tuple(groups), logs=logs, **found[chosen])


def metrics_beside(trace: Path) -> Path | None:
    """Return the metrics of the run that recorded a trace (a file or its folder), or None."""
    is_folder = trace.is_dir()
    if not is_folder and not (trace.is_file() and _NAME.fullmatch(trace.name)):
        return None
    found = [
        files
        for files in _recordings(trace if is_folder else trace.parent).values()
        if TRACE.suffix in files and (is_folder or files[TRACE.suffix].name == trace.name)
    ]
    if len(found) != 1:
        return None
    _check_one_run(path for kind, path in found[0].items() if kind != LAYOUTS.suffix)
    return found[0].get(METRICS.suffix)


def refuse_as_source(output: Path, run: Path, flag: str) -> None:
    """Raise ValueError for an output that a later call would read as a file of the run."""
    folder, name = os.path.split(os.path.realpath(output))
    is_source = _NAME.fullmatch(name) or _LOG.fullmatch(name)
    if is_source and folder == os.path.realpath(run if run.is_dir() else run.parent):
        raise ValueError(
            f"{flag} {quoted(output)} would be read as a file of the run the next time; give "
            "another name or folder"
        )


def _check_one_run(paths: Iterable[Path]) -> None:
    """Refuse recordings of different runs; a header without a run is for its reader to refuse."""
    of = {path: run for path in paths if (run := run_of(path))}
    if len({*of.values()}) > 1:
        said = ", ".join(f"{quoted(path)} is of run {run}" for path, run in of.items())
        raise ValueError(f"{said}; they are of different runs, so move one away")


def _recordings(folder: Path) -> dict[int, dict[str, Path]]:
    """Return the recordings of each group in a folder, by kind as `RunFiles` names it."""
    found: dict[int, dict[str, Path]] = {}
    for path in folder.iterdir():
        if (match := _NAME.fullmatch(path.name)) and path.is_file():
            found.setdefault(int(match[1]), {})[match[2]] = path
    return found


_SUFFIXES = "|".join(format.suffix for format in (METRICS, TRACE, LAYOUTS))
_NAME = re.compile(rf"group-(0|[1-9][0-9]{{0,8}})\.({_SUFFIXES})")
_LOG = re.compile(r"[^.].*\.log", re.DOTALL)
