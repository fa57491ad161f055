"""Files of a run, found by their names in one folder; only their runs' numbers are read.

Names alone identify the files, so no output in a run's folder may have such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_laer.files.checks import quoted
from megatron_laer.files.recording import run_of
from megatron_laer.files.records import is_cut_off
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE

_WAYS = "--fsep-record DIR metrics trace layouts writes them"


@dataclass(frozen=True)
class RunFiles:
    """Files of one FSEP group: at least a recording of metrics or a trace.

    `groups` are all groups with recordings. Only the settings of `metrics_beside` are read; they
    are next to a trace that is given alone.
    """

    name: str
    group: int = 0
    groups: tuple[int, ...] = (0,)
    metrics: Path | None = None
    metrics_beside: Path | None = None
    trace: Path | None = None
    layouts: Path | None = None
    logs: tuple[Path, ...] = ()

    def all_files(self) -> list[Path]:
        recordings = (self.metrics, self.metrics_beside, self.trace, self.layouts)
        return [file for file in (*recordings, *self.logs) if file is not None]


def find_run(given: Path, group: int | None) -> RunFiles:
    """Find the files of a run; without `group`, those of the first group.

    Raises ValueError if nothing is there (of this group), or a group has two recordings of a kind
    or those of two runs.
    """
    if not given.exists():
        raise ValueError(f"run {quoted(given)} does not exist; give a folder or a trace")
    if not given.is_dir():
        return RunFiles(str(given), trace=given, metrics_beside=metrics_beside(given))
    files = _files(given)
    found = _by_group(files)
    groups = sorted({*found["metrics"], *found["trace"]})
    if not groups:
        raise ValueError(f"folder {quoted(given)} holds no recording of a run; {_WAYS}")
    chosen = groups[0] if group is None else group
    if chosen not in groups:
        raise ValueError(
            f"--group {chosen}: {quoted(given)} has recordings of the groups {groups}; give one"
        )
    of_group = {kind: by_group.get(chosen) for kind, by_group in found.items()}
    _check_one_run(of_group.values())
    return RunFiles(
        str(given),
        chosen,
        tuple(groups),
        **of_group,
        logs=tuple(path for path in files if _LOG.fullmatch(path.name)),
    )


def metrics_beside(trace: Path) -> Path | None:
    """Return the metrics of the run that recorded a trace (a file or its folder), or None."""
    is_folder = trace.is_dir()
    if not is_folder and not (trace.is_file() and _NAMES["trace"].fullmatch(trace.name)):
        return None
    found = _by_group(_files(trace if is_folder else trace.parent))
    groups = [of for of, path in found["trace"].items() if is_folder or path.name == trace.name]
    if len(groups) != 1:
        return None
    metrics = found["metrics"].get(groups[0])
    _check_one_run([found["trace"][groups[0]], metrics])
    return metrics


def refuse_as_source(output: Path, run: Path, flag: str) -> None:
    """Raise ValueError for an output that a later call would read as a file of the run."""
    folder, name = os.path.split(os.path.realpath(output))
    is_source = any(one.fullmatch(name) for one in (*_NAMES.values(), _LOG))
    if is_source and folder == os.path.realpath(run if run.is_dir() else run.parent):
        raise ValueError(
            f"{flag} {quoted(output)} would be read as a file of the run the next time; give "
            "another name or folder"
        )


def _check_one_run(paths: Iterable[Path | None]) -> None:
    """Refuse recordings of different runs; a header without a run is for its reader to refuse."""
    of = {path: run for path in paths if path is not None and (run := run_of(path))}
    if len({*of.values()}) > 1:
        said = ", ".join(f"{quoted(path)} is of run {run}" for path, run in of.items())
        raise ValueError(f"{said}; they are of different runs, so move one away")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError without a file name into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{quoted(path)} cannot be read: {error}") from error


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not is_cut_off(path)]


def _by_group(files: Sequence[Path]) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {kind: {} for kind in _NAMES}
    for path in files:
        for kind, name in _NAMES.items():
            if match := name.fullmatch(path.name):
                other = found[kind].setdefault(int(match[1]), path)
                if other != path:
                    raise ValueError(
                        f"{quoted(other)} and {quoted(path)} are both of group {int(match[1])}; "
                        "move one away"
                    )
    return found


_NAMES = {
    format.suffix: re.compile(rf"group-([0-9]{{1,9}})\.{format.suffix}")
    for format in (METRICS, TRACE, LAYOUTS)
}
_LOG = re.compile(r"[^.].*\.log", re.DOTALL)
