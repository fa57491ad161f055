"""`doctor` prints what this machine has, what is supported and what is missing.

Like the room that examines, it needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os

from megatron_laer.doctor import examine

# A long path or reason must not push all verdicts out of sight.
_FOUND_WIDTH = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `doctor`, which takes no arguments."""
    parser.description = (
        "What a bug report needs: versions, devices, the native core and the launcher as seen "
        "from here. Status 1 if something that training needs is missing."
    )


def run(_: argparse.Namespace) -> int:
    """Print the table; the status is 1 if something that training needs is missing, else 0."""
    rows = examine(os.environ)
    name_width = max(len(row.name) for row in rows)
    found_width = min(max(len(row.found) for row in rows), _FOUND_WIDTH)
    for row in rows:
        print(f"{row.name:{name_width}}  {row.found:{found_width}}  {row.verdict_and_note}")
    stopping = [row.name for row in rows if row.stops]
    if stopping:
        print(f"\nmissing or unsupported: {', '.join(stopping)}")
    else:
        print("\neverything that training needs is there")
    return 1 if stopping else 0
