"""Files for `prepare-data`: those that are given, or Python's own sources. None is opened."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from megatron_laer.files.checks import check_regular, quoted


def check_files(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the paths of the inputs; raise an error for one that is no file with content."""
    if not inputs:
        raise ValueError("inputs is empty: name at least one text file")
    files = []
    for given in inputs:
        path = Path(given)
        check_regular(path)
        if path.stat().st_size == 0:
            raise ValueError(f"{quoted(path)} is empty; leave it out, or give a file with text")
        files.append(path)
    return files


def default_text_sources() -> list[Path]:
    """List the Python standard library's source files, without tests and empty files."""
    skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    found = []
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted({name for name in folders if not name.startswith(".")} - skipped)
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return [
        path
        for path in found
        if path.suffix == ".py"
        and path.is_file()
        and path.stat().st_size
        and os.access(path, os.R_OK)
    ]
