"""`doctor` prints what this machine has, what is supported and what is missing.

Like the room that examines, it needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os

from megatron_laer.environment import CONNECTIONS
from megatron_laer.files.checks import one_line
from megatron_laer.tools.doctor import examine

# The longest name. A long path or reason must not push all verdicts out of sight.
_NAME_WIDTH, _FOUND_WIDTH = len(CONNECTIONS), 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `doctor`, which takes no arguments."""
    parser.description = (
        "What a bug report needs: versions, devices, the native core and the launcher as seen "
        "from here. Status 1 if something that training needs is missing."
    )


def run(_: argparse.Namespace) -> int:
    """Print the table; the status is 1 if something that training needs is missing, else 0."""
    stopping = []
    for row in examine(os.environ):
        text = f"{row.name:{_NAME_WIDTH}}  {row.found:{_FOUND_WIDTH}}  {row.verdict_and_note}"
        # What broken modules and compilers say may hold anything. An import may take minutes.
        print(one_line(text), flush=True)
        if row.stops:
            stopping.append(row.name)
    if stopping:
        print(f"\nmissing or unsupported: {', '.join(stopping)}")
    else:
        print("\neverything that training needs is there")
    return 1 if stopping else 0
