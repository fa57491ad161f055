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
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_laer import __version__, doctor
from megatron_laer.files.checks import one_line
from megatron_laer.launch import in_one_line

# As shells report a process that a signal ended.
_INTERRUPTED = 128 + signal.SIGINT
_NO_READER = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    That is 2 for what the user can mend, with one line on stderr that says it; 130 after Ctrl-C;
    141 without a word if the reader of the output has gone, such as `head`. The script of `train`
    runs as if Python had started it: signals and exceptions are its own, but for settings that the
    plugin refuses.

    Raises:
        SystemExit: argparse has had its say, or SIGTERM or SIGHUP came, after files were tidied up.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            status, script = _run(words)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    except OSError as error:
        _discard_output()
        return _fail(f"the output cannot be written: {error}")
    if script is not None:
        from megatron_laer.support import RefusedError

        try:
            runpy.run_path(script, run_name="__main__")
        except RefusedError as error:
            return _fail(f"train: {error}")
    return status


def _run(words: list[str]) -> tuple[int, str | None]:
    """Run a command; returns its status, and the script that `train` has everything ready for."""
    command = words[0] if words else ""
    try:
        args, script_args = _parse(words)
        if args.command == "train":
            _prepare_training(args.script, script_args)
            return 0, str(args.script)
        with _stopped_by_exceptions():
            return _run_command(args), None
    except KeyboardInterrupt:
        return _fail(f"{command}: interrupted", _INTERRUPTED), None
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        return _fail(f"{command}: {in_one_line(error)}"), None
    except MemoryError:
        return _fail(f"{command}: the memory of this process does not suffice"), None


def _run_command(args: argparse.Namespace) -> int:
    if args.command == "prepare-data":
        from megatron_laer.cli import prepare_data

        return prepare_data.run(args)
    if args.command == "plan":
        from megatron_laer.cli import plan

        return plan.run(args)
    if args.command == "doctor":
        return doctor.run()
    if args.command == "inspect":
        from megatron_laer import inspection

        print(inspection.describe(args.checkpoint))
    else:
        from megatron_laer.model_flags import model_flags
        from megatron_laer.platform.cpu import CPU_FLAGS

        print(shlex.join([*model_flags(args.file), *(CPU_FLAGS if args.cpu else ())]))
    return 0


@contextmanager
def _stopped_by_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, so that its `finally` clauses run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # A signal that is ignored, as under nohup, stays so.
    mine = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str, status: int = 2) -> int:
    print(f"{_program()} {one_line(message)}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Let what is still buffered go nowhere, or Python would fail once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _program() -> str:
    """The words that have started this, to be typed again."""
    is_module = Path(sys.argv[0]) == Path(__file__).parents[1] / "__main__.py"
    return "python -m megatron_laer" if is_module else "megatron-laer"


_EXAMPLES = """\
examples:
  %(prog)s doctor
  %(prog)s flags mixtral-8x7b-e8k2
  %(prog)s prepare-data --python-sources --output data/text
  %(prog)s plan traces/group-0.trace --ranks 64 --node-size 8 --capacity 2 3 4
  %(prog)s inspect checkpoints
  torchrun --nproc-per-node 8 -m megatron_laer train Megatron-LM/pretrain_gpt.py -- FLAGS
"""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of after the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and what follows `--`.

    Raises:
        ImportError: the module of the command cannot be imported.
    """
    # That belongs to the script; argparse treats `--` differently from version to version.
    own, script_args = _split_at_dashes(words)
    parser = _parser(own[0] if own else "")
    args, unknown = parser.parse_known_args(own)
    parser.prog = f"{parser.prog} {args.command}"
    if unknown:
        hint = "; the script's own follow --" if args.command == "train" else ""
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}")
    if script_args and args.command != "train":
        parser.error(f"nothing follows -- here, got {shlex.join(script_args)}")
    return args, script_args


def _parser(command: str) -> _Parser:
    """The parser of all commands, of which `command` alone has its arguments if they are elsewhere.

    Raises:
        ImportError: the module of `command` cannot be imported.
    """
    prog = _program()
    parser = _Parser(
        prog=prog,
        description="Fully Sharded Expert Parallel for Megatron-LM",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"megatron-laer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run an unmodified Megatron script with the plugin on",
        usage=f"{prog} train SCRIPT -- ARGS",
        description="Runs a script such as Megatron-LM's pretrain_gpt.py, under torchrun, with "
        "--expert-parallel-mode and the --fsep flags added to Megatron's own.",
    )
    train.add_argument("script", metavar="SCRIPT", help="the script; its arguments follow --")
    prepare_data_parser = commands.add_parser("prepare-data", help="make a dataset from text files")
    if command == "prepare-data":
        from megatron_laer.cli import prepare_data

        prepare_data.add_arguments(prepare_data_parser)
    inspect = commands.add_parser("inspect", help="print what is in a checkpoint")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run, or of one iteration")
    flags = commands.add_parser("flags", help="print Megatron's flags for a model configuration")
    flags.add_argument("file", metavar="FILE", help="a YAML file, or a name in configs/models")
    flags.add_argument(
        "--cpu", action="store_true", help="add the flags that Megatron needs without a GPU"
    )
    plan_command = commands.add_parser(
        "plan",
        help="compare strategies on a routing trace",
        description="What each strategy would have made of a recorded run: balance, traffic and "
        "predicted time of a layer.",
    )
    if command == "plan":
        from megatron_laer.cli import plan

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
