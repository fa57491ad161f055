"""Command line; `_EXAMPLES` has one of each command.

Each command has a file with `add_arguments` and `run`, which parse and print; other folders do the
work. A file is imported for its command only, so that `doctor` works where others cannot be
imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_laer import __version__
from megatron_laer.files.shipped import did_you_mean
from megatron_laer.tools.cli.program import (
    Parser,
    ended,
    escape_warnings,
    failed,
    stopped_by_exceptions,
)

# Commands, with their lines in `--help`.
_COMMANDS = {
    "train": "run an unmodified Megatron script with the plugin on",
    "prepare-data": "make a dataset from text files",
    "inspect": "print what is in a checkpoint",
    "flags": "print Megatron's flags for a model configuration",
    "plan": "compare strategies on a routing trace",
    "report": "write a page on a run",
    "simulate": "predict whole iterations of stock and FSEP",
    "advise": "find the fastest settings for a run, or say to take stock",
    "calibrate": "measure a cluster's constants, for plan and training",
    "check-recipe": "say whether settings run with FSEP, before a run",
    "doctor": "print what this machine has, and what is missing",
}

# Share of letters that a mistyped flag has in common with the meant one: --topk is not --tokens.
_LEAST_ALIKE = 0.75

# Commands that take flags after `--`.
_TAKE_FLAGS = ("train", "check-recipe", "advise")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as `program.ended` does.

    The script of `train` runs as if Python had started it: signals and exceptions are its own,
    except for settings that the plugin refuses.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for words, and gets no other answer
        import argcomplete

        argcomplete.autocomplete(_parsers([*os.environ["COMP_LINE"].split(), ""][1])[0])
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join([_program(), *words[:1]])
    script = ""

    def run() -> int:
        nonlocal script
        args, script_args = _parse(words)
        if args.command == "train":
            from megatron_laer.tools.cli import train

            train.prepare(args.script, script_args)
            script = args.script
            return 0
        escape_warnings()
        with stopped_by_exceptions():
            return int(_module(args.command).run(args))

    status = ended(name, run)
    if script and status == 0:
        from megatron_laer.tools.cli import train

        refusal = train.run_script(script)
        return status if refusal is None else failed(name, refusal)
    return status


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")


def _program() -> str:
    is_module = Path(sys.argv[0]) == Path(__file__).parents[2] / "__main__.py"
    return "python -m megatron_laer" if is_module else "megatron-laer"


_EXAMPLES = """\
exit status: 0 yes, or answered; 1 no: refused (check-recipe), missing (doctor), damaged (inspect),
nothing fits (advise); 2 the input cannot be used, in one line; 3 to 5 yes with changes
(check-recipe); 130 and 143 stopped by a signal

examples:
  %(prog)s doctor
  %(prog)s flags mixtral-8x7b-e8k2
  %(prog)s prepare-data --python-sources --output data/text
  %(prog)s plan traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s report runs/one --out report.html
  %(prog)s simulate traces/group-0.trace --model my-model.yaml --ranks 64
  %(prog)s advise --model qwen3-30b-a3b --cluster h100-8 --gpus 64
  torchrun --nproc-per-node 8 -m megatron_laer calibrate my-node.yaml
  %(prog)s check-recipe -- --num-experts 64 --expert-model-parallel-size 8 FLAGS
  %(prog)s inspect checkpoints
  torchrun --nproc-per-node 8 -m megatron_laer train Megatron-LM/pretrain_gpt.py -- FLAGS
"""


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the words after `--`, which are also `args.flags`."""
    # Split off the script's words first: argparse's treatment of `--` differs between versions.
    dashes = words.index("--") if "--" in words else len(words)
    own, script_args = words[:dashes], words[dashes + 1 :]
    parser, of_command = _parsers(own[0] if own else "")
    args, unknown = parser.parse_known_args(own)
    parser.prog = f"{parser.prog} {args.command}"
    if unknown:
        hint = " (Megatron's follow --)" if args.command in _TAKE_FLAGS else ""
        meant = _meant(unknown[0].partition("=")[0], of_command._option_string_actions)
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}{meant}")
    if script_args and args.command not in _TAKE_FLAGS:
        parser.error(f"nothing follows -- here, got {shlex.join(script_args)}")
    args.flags = script_args
    return args, script_args


def _meant(given: str, flags: Iterable[str]) -> str:
    """Return a question for the flag that was meant, of which most letters are the same."""
    return did_you_mean(given, get_close_matches(given[:100], list(flags), 1, _LEAST_ALIKE))


def _parsers(command: str) -> tuple[Parser, Parser]:
    """Make the parser of all commands and that of `command`; only it gets its arguments."""
    parser = Parser(
        prog=_program(),
        description="Fully Sharded Expert Parallel for Megatron-LM",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
    )
    parser.add_argument("-V", "--version", action="version", version=f"megatron-laer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of = {name: commands.add_parser(name, help=summary) for name, summary in _COMMANDS.items()}
    if command in of:
        _module(command).add_arguments(of[command])
    return parser, of.get(command, parser)
