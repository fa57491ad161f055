"""Checks of the commands' outputs before any work, and their progress bars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_laer.files.checks import (
    is_same_file,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.writing import write_output
from megatron_laer.tools.report.run_files import refuse_as_source


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Sequence[Path | None], trace: Path | None
) -> None:
    """Refuse outputs that cannot be written, are one file, or would replace an input.

    In the trace's folder, no output may have the name of a recording.
    """
    given = {flag: output for flag, output in outputs.items() if output is not None}
    read = [file for file in (*inputs, trace) if file is not None]
    for flag, output in given.items():
        refuse_unwritable(output, flag)
        refuse_overwriting(output, read, flag)
        if trace is not None:
            refuse_as_source(output, trace, flag)
        for other, there in given.items():
            if other < flag and is_same_file(output, there):
                raise ValueError(f"{other} and {flag} are one file; give two, got {quoted(output)}")


def write_json(path: Path | None, content: object) -> None:
    """Write the file of --json, if it is asked for."""
    if path is not None:
        write_output(path, json.dumps(content, indent=1) + "\n", "--json")


def bar(title: str, **more: Any) -> Any:
    """Return a function that wraps items in a progress bar, shown on a terminal only."""
    return lambda items: tqdm(items, desc=title, disable=None, **more)
