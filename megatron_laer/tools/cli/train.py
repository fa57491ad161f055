"""`train` runs an unmodified Megatron script with the plugin on, as if Python had started it."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from megatron_laer import launch
from megatron_laer.tools.cli.program import describe

_EXAMPLES = """\
examples:
  torchrun --nproc-per-node 8 -m megatron_laer train Megatron-LM/pretrain_gpt.py -- FLAGS \\
      --expert-parallel-mode fsep --expert-model-parallel-size 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s SCRIPT -- ARGS"
    describe(
        parser,
        "Runs a script such as Megatron-LM's pretrain_gpt.py, under torchrun, with "
        "--expert-parallel-mode and the --fsep flags added to Megatron's own.",
        _EXAMPLES,
    )
    parser.add_argument("script", metavar="SCRIPT", help="the script; its arguments follow --")


def prepare(script: str, script_args: list[str]) -> None:
    """Set this process up as if `python SCRIPT ARGS` had started it, with the plugin on."""
    if not Path(script).is_file():
        raise ValueError(f"script {script!r} does not exist; give a path to Megatron's script")
    sys.argv[:] = [script, *script_args]
    # As Python does, and before the first import of Megatron: the `megatron` folder next to the
    # script precedes an installed one, and its version is the one that is checked.
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)

    launch.prepare()


def run_script(script: str) -> str | None:
    """Run the script; return the plugin's refusal of its settings, or None."""
    from megatron_laer.support import RefusedError

    try:
        runpy.run_path(script, run_name="__main__")
    except RefusedError as error:
        return str(error)
    return None
