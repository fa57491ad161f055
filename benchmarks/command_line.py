"""Benchmarks and scripts start and end as the commands of the package do.

Bad input is one line and status 2, said before the work; a file is written whole or not at all, and
over no input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_laer.files.checks import quoted, refuse_unwritable
from megatron_laer.files.writing import write_file
from megatron_laer.tools.cli.program import Parser, ended, escape_warnings, stopped_by_exceptions

# Those among which eight experts can be dealt out; and more than any benchmark is meant for.
RANKS, MOST_REPEATS, MOST_STEPS = (2, 4, 8), 1000, 10**5


def program(name: str, run: Callable[[], int]) -> NoReturn:
    """Run a program, and leave the process with its status.

    Args:
        name: as it was started, for messages.

    Raises:
        SystemExit: always.
    """

    def stoppable() -> int:
        escape_warnings()
        with stopped_by_exceptions():
            return run()

    sys.exit(ended(name, stoppable))


def parser_of(module: str, about: str | None) -> Parser:
    """Make the parser of a benchmark that is started as a module.

    Args:
        about: its docstring, whose first line is shown.
    """
    return Parser(prog=f"python -m {module}", description=(about or "").splitlines()[0])


def add_json(parser: argparse.ArgumentParser, told: str = "where to write the result") -> None:
    """Add --json."""
    parser.add_argument("--json", type=output, metavar="FILE", help=told)


def output(text: str) -> Path:
    """Take a file that can be written, for argparse."""
    try:
        refuse_unwritable(text, "the file")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def checkout(text: str) -> Path:
    """Take a checkout of this repository, for argparse."""
    if not (Path(text) / "megatron_laer").is_dir():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no checkout of this repository")
    return Path(text).resolve()


def write_json(path: Path | None, content: Any) -> None:
    """Write a result where it was asked for, if it was.

    Raises:
        OSError: it cannot be written.
    """
    if path is not None:
        write_file(path, json.dumps(content, indent=1) + "\n")
