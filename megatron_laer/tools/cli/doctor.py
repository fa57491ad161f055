"""`doctor` prints the present, supported and missing parts of this machine.

Like `tools.doctor`, it needs only the standard library.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_laer.environment import CONNECTIONS
from megatron_laer.files.checks import one_line
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.doctor import examine

# Width of the longest name. A long path or reason must not push all results out of sight.
_NAME_WIDTH, _FOUND_WIDTH = len(CONNECTIONS), 48


_EXAMPLES = """\
examples:
  %(prog)s
  srun --ntasks-per-node 1 %(prog)s
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "The facts for a bug report: versions, devices, the native core and the launcher as seen "
        "from here. Status 1 if something that training needs is missing.",
        _EXAMPLES,
    )


def run(_: argparse.Namespace) -> int:
    """Print the verdict and the table; return 1 if something that training needs is missing."""
    if sys.stderr.isatty():
        print("doctor: importing torch, Megatron and others", file=sys.stderr, flush=True)
    checks = list(examine(os.environ))
    stopping = [check for check in checks if check.stops]
    verdict = "everything that training needs is there"
    if stopping:
        verdict = f"missing or unsupported: {', '.join(check.name for check in stopping)}"
    print(f"{verdict}\n")
    for check in (*stopping, *(check for check in checks if not check.stops)):
        text = f"{check.name:{_NAME_WIDTH}}  {check.found:{_FOUND_WIDTH}}  "
        # Texts of broken modules may contain anything.
        print(one_line(text + check.status_and_note))
    return 1 if stopping else 0
