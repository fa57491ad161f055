"""`inspect` prints what a checkpoint holds, without loading a tensor."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect` to `parser`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")


def run(args: argparse.Namespace) -> int:
    """Run `inspect`."""
    # Not at the top: it imports NumPy, which help does not need.
    from megatron_laer.tools import inspection

    print(inspection.describe(args.checkpoint))
    return 0
