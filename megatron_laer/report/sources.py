"""The files of a run are found here by their names, in one folder; none is read.

While the run goes on they are the same files, the last of whose lines may lack its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_laer.files.checks import quoted
from megatron_laer.files.recording import is_cut_off

_WAYS = "--fsep-record-metrics, --fsep-record-trace and --fsep-record-layouts write them"


@dataclass(frozen=True)
class Sources:
    """Names what there is of one FSEP group; at least a recording of metrics or a trace.

    Attributes:
        name: of the run, as the user gave it.
        group: whose recordings these are.
        groups: all that have recordings.
        metrics: the recording of metrics.
        trace: the recorded routing, of any format that `plan` reads.
        layouts: the recording of layouts.
        logs: logs of Megatron.
    """

    name: str
    group: int = 0
    groups: tuple[int, ...] = (0,)
    metrics: Path | None = None
    trace: Path | None = None
    layouts: Path | None = None
    logs: tuple[Path, ...] = ()


def find(given: Path, group: int | None) -> Sources:
    """Find the files of a run.

    Args:
        given: its folder, or a trace.
        group: of the FSEP groups; None takes the first.

    Raises:
        ValueError: nothing is there, or not of this group.
        OSError: it cannot be looked at.
    """
    if not given.exists():
        raise ValueError(f"run {quoted(given)} does not exist; give a folder or a trace")
    if not given.is_dir():
        return Sources(str(given), trace=given)
    files = [
        path
        for path in sorted(given.iterdir())
        if path.is_file() and not path.name.startswith(".") and not is_cut_off(path)
    ]
    found = {
        kind: {
            int(number): path
            for path in files
            if path.suffix == ending
            and (number := path.stem.removeprefix(begin)) != path.stem
            and number.isascii()
            and number.isdigit()
            and len(number) < 10
        }
        for kind, (begin, ending) in _NAMES.items()
    }
    groups = sorted({*found["metrics"], *found["trace"]})
    if not groups:
        if any(path.name.startswith(_OTHER_TRACES) for path in files):
            return Sources(str(given), trace=given)
        raise ValueError(f"folder {quoted(given)} holds no recording of a run; {_WAYS}")
    chosen = groups[0] if group is None else group
    if chosen not in groups:
        raise ValueError(
            f"--group {chosen}: {quoted(given)} has recordings of the groups {groups}; give one"
        )
    return Sources(
        str(given),
        chosen,
        tuple(groups),
        **{kind: by_group.get(chosen) for kind, by_group in found.items()},
        logs=tuple(path for path in files if path.suffix == ".log"),
    )


_NAMES = {
    "metrics": ("metrics-", ".jsonl"),
    "trace": ("group-", ".trace"),
    "layouts": ("group-", ".jsonl"),
}
# Folders of Megatron's and of SmartMoE's traces.
_OTHER_TRACES = ("router_trace_rank", "table_iter")
