"""The command line: thin callers of the modules that do the work.

torchrun ... -m megatron_laer train PATH/TO/pretrain_gpt.py -- <Megatron's flags>
python -m megatron_laer prepare-data --input FILES --output PREFIX
python -m megatron_laer flags mixtral-8x7b-e8k2
python -m megatron_laer plan TRACE --ranks N --capacity C --cluster a100-4x8-ib800
python -m megatron_laer inspect CHECKPOINT
python -m megatron_laer doctor

A command's module is imported when the command is asked for, so that the others, and `doctor` above
all, work where it cannot be imported.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_laer import __version__, doctor
from megatron_laer.launch import in_one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows belongs to the script; argparse treats `--` differently from version to version.
    own, script_args = _split_at_dashes(words)
    try:
        parser = _parser(own[0] if own else "")
    except ImportError as error:
        return _stopped(own[0], error)
    args, unknown = parser.parse_known_args(own)
    if unknown:
        hint = "; the script's own follow --" if args.command == "train" else ""
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}")
    if script_args and args.command != "train":
        parser.error(f"{args.command} takes nothing after --, got {shlex.join(script_args)}")
    try:
        if args.command == "train":
            _prepare_training(args.script, script_args)
        elif args.command == "prepare-data":
            from megatron_laer import data

            return data.run(args)
        elif args.command == "plan":
            from megatron_laer.simulator import command as plan

            return plan.run(args)
        elif args.command == "inspect":
            from megatron_laer import inspection

            print(inspection.describe(args.checkpoint))
            return 0
        elif args.command == "doctor":
            return doctor.run()
        else:
            from megatron_laer.model_flags import model_flags

            print(shlex.join(model_flags(args.file)))
            return 0
    except (ValueError, OSError, ImportError) as error:
        return _stopped(args.command, error)
    runpy.run_path(args.script, run_name="__main__")
    return 0


def _stopped(command: str, error: Exception) -> int:
    print(f"megatron_laer {command}: {in_one_line(error)}", file=sys.stderr)
    return 2


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of all commands, of which `command` alone has its arguments if they are elsewhere.

    Raises:
        ImportError: the module of `command` cannot be imported.
    """
    parser = argparse.ArgumentParser(
        prog="megatron_laer", description="Fully Sharded Expert Parallel for Megatron-LM"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run an unmodified Megatron script with the plugin on",
        usage="megatron_laer train SCRIPT -- ARGS",
        description="Runs a script such as Megatron-LM's pretrain_gpt.py, under torchrun, with "
        "--expert-parallel-mode and the --fsep flags added to Megatron's own.",
    )
    train.add_argument("script", metavar="SCRIPT", help="the script; its arguments follow --")
    prepare_data = commands.add_parser("prepare-data", help="make a dataset from text files")
    if command == "prepare-data":
        from megatron_laer import data

        data.add_arguments(prepare_data)
    inspect = commands.add_parser("inspect", help="print what is in a checkpoint")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")
    flags = commands.add_parser("flags", help="print Megatron's flags for a model configuration")
    flags.add_argument("file", metavar="FILE", help="a YAML file, or a name in configs/models")
    plan_command = commands.add_parser(
        "plan",
        help="compare strategies on a routing trace",
        description="What each strategy would have made of a recorded run: balance, traffic and "
        "predicted time of a layer.",
    )
    if command == "plan":
        from megatron_laer.simulator import command as plan

        plan.add_arguments(plan_command)
    commands.add_parser(
        "doctor",
        help="print what this machine has, and what is missing",
        description="What a bug report needs: versions, devices, the native core and the launcher "
        "as seen from here. Status 1 if something that training needs is missing.",
    )
    return parser


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    position = words.index("--")
    return words[:position], words[position + 1 :]


def _prepare_training(script: str, script_args: list[str]) -> None:
    """Make this process look as if `python SCRIPT ARGS` had started it, with the plugin on."""
    if not Path(script).is_file():
        raise ValueError(f"script {script!r} does not exist; give a path to Megatron's script")
    sys.argv[:] = [script, *script_args]
    # As Python does, and before the first import of Megatron: the `megatron` folder beside a
    # checkout's script wins over an installed one, and is the one whose version is checked.
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)

    from megatron_laer.launch import prepare

    prepare()
