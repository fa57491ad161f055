"""`inspect` prints the contents of a checkpoint, without loading a tensor.

The status is 1 if a planner's state in it is damaged; training then plans anew.
"""

from __future__ import annotations

import argparse

from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import working

_EXAMPLES = """\
examples:
  %(prog)s checkpoints
  %(prog)s checkpoints/iter_0000500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Prints the contents of a checkpoint without loading a tensor, and the planner's state. "
        "Status 1 if that state is damaged.",
        _EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")


def run(args: argparse.Namespace) -> int:
    with working("importing torch"):
        # Not at the top: it imports torch, which help does not need.
        from megatron_laer.tools import inspection

    text, is_damaged = inspection.describe(args.checkpoint)
    print(text)
    return int(is_damaged)
