"""`inspect` prints the contents of a checkpoint, without loading a tensor."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")


def run(args: argparse.Namespace) -> int:
    # Not at the top: it imports NumPy, which help does not need.
    from megatron_laer.tools import inspection

    print(inspection.describe(args.checkpoint))
    return 0
