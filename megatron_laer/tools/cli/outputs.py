"""Checks of the commands' outputs before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_laer.files.checks import (
    is_same_file,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.writing import write_output
from megatron_laer.tools.report.run_files import refuse_as_source

# At the end of pages and the begin of JSON that these commands write.
MARK, _MARK_OF_JSON = "<!-- Written by megatron_laer -->\n", {"written_by": "megatron_laer"}


def written_here(path: Path) -> bool:
    """Return True for an empty file, and for a page or JSON that a command has written."""
    with path.open("rb") as file:
        begin = file.read(100)
        file.seek(-min(path.stat().st_size, len(MARK)), os.SEEK_END)
        return (
            not begin
            or json.dumps(_MARK_OF_JSON)[1:-1].encode() in begin
            or (file.read() == MARK.encode())
        )


def refuse_replacing(
    output: Path,
    flag: str,
    *,
    force: bool,
    may_replace: Callable[[Path], bool] = written_here,
) -> None:
    """Refuse an output that is there and may not be replaced, unless --force is given."""
    if force or not os.path.isfile(output):
        return
    try:
        is_replaced = may_replace(output)
    except (OSError, ValueError):  # not ours to read
        is_replaced = False
    if not is_replaced:
        raise ValueError(
            f"{flag} {quoted(output)} is there already; give another file, or --force to replace it"
        )


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Sequence[Path | None],
    trace: Path | None,
    *,
    force: bool,
) -> None:
    """Refuse outputs that cannot be written, are one file, or would replace an input.

    In the trace's folder, no output may have the name of a recording. A file of --homes may be
    there, since it is read and extended.
    """
    given = {flag: output for flag, output in outputs.items() if output is not None}
    read = [file for file in (*inputs, trace) if file is not None]
    for flag, output in given.items():
        refuse_unwritable(output, flag)
        refuse_overwriting(output, read, flag)
        if trace is not None:
            refuse_as_source(output, trace, flag)
        if flag != "--homes":
            refuse_replacing(output, flag, force=force)
        for other, there in given.items():
            if other < flag and is_same_file(output, there):
                raise ValueError(f"{other} and {flag} are one file; give two, got {quoted(output)}")


def write_json(path: Path | None, content: Mapping[str, object]) -> None:
    """Write the file of --json, if it is asked for."""
    if path is not None:
        write_output(path, json.dumps({**_MARK_OF_JSON, **content}, indent=1) + "\n", "--json")
