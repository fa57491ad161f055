"""Files of a run, found by their names in one folder; only their runs' numbers are read.

Names alone identify the files, so no output in a run's folder may have such a name. Recordings side
by side are compared by their steps and microbatches.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_laer.files.checks import check_regular, naming, open_input, quoted
from megatron_laer.files.recording import run_of
from megatron_laer.files.records import Format, Records
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE

logger = logging.getLogger(__name__)

_WAYS = "give one that --fsep-record DIR metrics trace layouts wrote"


@dataclass(frozen=True)
class RunFiles:
    """Files of one FSEP group; `groups` are all groups with metrics.

    `of_other_groups` are the other groups' recordings.
    """

    name: str
    group: int
    groups: tuple[int, ...]
    metrics: Path
    trace: Path | None = None
    layouts: Path | None = None
    logs: tuple[Path, ...] = ()
    of_other_groups: tuple[Path, ...] = ()

    def all_files(self) -> list[Path]:
        recordings = (self.metrics, self.trace, self.layouts)
        return [file for file in (*recordings, *self.logs) if file is not None]


def find_run(given: Path, group: int | None) -> RunFiles:
    """Find the files of a run; without `group`, those of the first group.

    Raises ValueError if no metrics are there (of this group), or if its recordings are of two runs
    or no regular files.
    """
    if not given.exists():
        raise ValueError(f"run {quoted(given)} does not exist; give a folder")
    if not given.is_dir():
        raise ValueError(f"run {quoted(given)} is no folder; {_WAYS}. `plan` replays a trace alone")
    found = _recordings(given)
    groups = [of for of, files in sorted(found.items()) if METRICS.suffix in files]
    if not groups:
        there = ", ".join(quoted(path.name) for files in found.values() for path in files.values())
        only = f" (only {there})" if there else ""
        raise ValueError(f"folder {quoted(given)} holds no metrics of a run{only}; {_WAYS}")
    chosen = groups[0] if group is None else group
    if chosen not in groups:
        raise ValueError(
            f"--group {chosen}: {quoted(given)} has metrics of the groups {groups}; give one"
        )
    _check_files(found[chosen].values())
    return _run_files(given, chosen, found)


def run_of_metrics(metrics: Path) -> RunFiles:
    """Return the files of the run next to a group's metrics."""
    match = _NAME.fullmatch(metrics.name)
    assert match is not None
    return _run_files(metrics.parent, int(match[1]), _recordings(metrics.parent))


def _run_files(folder: Path, group: int, found: Mapping[int, Mapping[str, Path]]) -> RunFiles:
    return RunFiles(
        str(folder),
        group,
        tuple(of for of, files in sorted(found.items()) if METRICS.suffix in files),
        **found[group],
        logs=tuple(path for path in sorted(folder.iterdir()) if _LOG.fullmatch(path.name)),
        of_other_groups=tuple(
            path for of, files in sorted(found.items()) if of != group for path in files.values()
        ),
    )


def metrics_beside(trace: Path) -> Path | None:
    """Return the metrics of the run that recorded a trace (a file or its folder), or None.

    Warn of steps that only one of the two has, or that the trace has in part.
    """
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
    both = {kind: path for kind, path in found[0].items() if kind != LAYOUTS.suffix}
    _check_files(both.values())
    if METRICS.suffix not in both:
        return None
    metrics, recorded = both[METRICS.suffix], both[TRACE.suffix]
    for lack in lacks(metrics, _passes_of(metrics), recorded, _passes_of(recorded)):
        logger.warning("%s", lack)
    return metrics


def refuse_as_source(output: Path, run: Path, flag: str) -> None:
    """Raise ValueError for an output that a later call would read as a file of the run."""
    folder, name = os.path.split(os.path.realpath(output))
    is_source = _NAME.fullmatch(name) or _LOG.fullmatch(name)
    if is_source and folder == os.path.realpath(run if run.is_dir() else run.parent):
        raise ValueError(
            f"{flag} {quoted(output)} would be read as a file of the run the next time; give "
            "another name or folder"
        )


def lacks(
    metrics: Path, passes: Mapping[int, float], trace: Path, microbatches: Mapping[int, float]
) -> Iterator[str]:
    """Describe the steps that metrics or a trace of one run lacks, and the other has.

    `passes` and `microbatches` are the sums over all layers by step. They have one proportion in
    all steps, since a model may pass a layer more than once in a microbatch.
    """
    for path, other, lacking in (
        (metrics, trace, microbatches.keys() - passes),
        (trace, metrics, passes.keys() - microbatches),
    ):
        if lacking:
            yield f"{quoted(path)} lacks the {ranges(lacking)}, which {quoted(other.name)} has"
    proportion = {
        step: passes[step] / microbatches[step] for step in passes if step in microbatches
    }
    if cut := {step for step, of in proportion.items() if of > 1.0001 * min(proportion.values())}:
        whole = quoted(metrics.name)
        yield f"{quoted(trace)} lacks microbatches of the {ranges(cut)}, which {whole} has"


def _passes_of(path: Path) -> dict[int, float]:
    """Return the passes or microbatches of all layers in the whole records, by step."""
    found = Counter[int]()
    with open_input(path) as file, naming(path):
        records = Records.of(file, path, _FORMATS[path.suffix[1:]])
        if path.suffix == f".{TRACE.suffix}":
            found.update(of.step for of in records.places(file, path) if of.kind == "counts")
        else:
            row = RECORDED_OF_LAYERS.index("passes")
            for frame, values in records.read(file, path, ["step"]):
                found[frame.step] += int(values["of_layers"][row].sum())
    return dict(found)


def ranges(steps: Iterable[int]) -> str:
    """Return steps in words, as Megatron counts: "iteration 4", or "iterations 4, 6 to 10"."""
    ends: list[list[int]] = []
    for iteration in sorted(step + 1 for step in steps):
        if ends and iteration == ends[-1][1] + 1:
            ends[-1][1] = iteration
        else:
            ends.append([iteration, iteration])
    shown = [str(a) if a == b else f"{a} to {b}" for a, b in ends[:_MOST_RANGES]]
    more = f" and {len(ends) - _MOST_RANGES} further ranges" if len(ends) > _MOST_RANGES else ""
    one = len(ends) == 1 and ends[0][0] == ends[0][1]
    return f"iteration{'' if one else 's'} {', '.join(shown)}{more}"


def _check_files(paths: Iterable[Path]) -> None:
    """Refuse files that are not regular, and recordings of different runs.

    A header without a run is for its reader to refuse.
    """
    paths = list(paths)
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{quoted(path)} is a link to nothing; remove it, or mend its target")
        check_regular(path)
    of = {path: run for path in paths if (run := run_of(path))}
    if len({*of.values()}) > 1:
        said = ", ".join(f"{quoted(path)} is of run {run}" for path, run in of.items())
        raise ValueError(f"{said}; they are of different runs, so move one away")


def _recordings(folder: Path) -> dict[int, dict[str, Path]]:
    """Return the recordings of each group in a folder, by kind as `RunFiles` names it.

    They are there by their names, even if they are no files.
    """
    found: dict[int, dict[str, Path]] = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[match[2]] = path
    return found


# More are not listed.
_MOST_RANGES = 4
_FORMATS: Mapping[str, Format] = {format.suffix: format for format in (METRICS, TRACE, LAYOUTS)}
_SUFFIXES = "|".join(_FORMATS)
_NAME = re.compile(rf"group-(0|[1-9][0-9]{{0,8}})\.({_SUFFIXES})")
_LOG = re.compile(r"[^.].*\.log", re.DOTALL)
