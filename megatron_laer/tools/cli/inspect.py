"""`inspect` prints the contents of a checkpoint, without loading a tensor.

The status is 1 if a planner's state in it is damaged; training then plans anew.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")


def run(args: argparse.Namespace) -> int:
    # Not at the top: it imports torch, which help does not need.
    from megatron_laer.tools import inspection

    text, is_damaged = inspection.describe(args.checkpoint)
    print(text)
    return int(is_damaged)
