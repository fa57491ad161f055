"""Start and end of benchmarks and scripts, the same as those of the package's commands.

Bad input gives one line and status 2 before the work. A file is written whole or not at all, and
never over an input.
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

# Numbers of ranks that can share eight experts; and limits beyond any sensible use.
RANKS, MOST_REPEATS, MOST_STEPS = (2, 4, 8), 1000, 10**5


def program(name: str, run: Callable[[], int]) -> NoReturn:
    """Run a program, and leave the process with its status; `name` is for messages."""

    def stoppable() -> int:
        escape_warnings()
        with stopped_by_exceptions():
            return run()

    sys.exit(ended(name, stoppable))


def parser_of(module: str, about: str | None) -> Parser:
    """Make the parser of a benchmark module; it shows the first line of the docstring `about`."""
    return Parser(prog=f"python -m {module}", description=(about or "").splitlines()[0])


def add_json(parser: argparse.ArgumentParser, told: str = "where to write the result") -> None:
    parser.add_argument("--json", type=output, metavar="FILE", help=told)


def output(text: str) -> Path:
    """Parse the path of a writable file, for argparse."""
    try:
        refuse_unwritable(text, "the file")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def checkout(text: str) -> Path:
    """Parse the path of a checkout of this repository, for argparse."""
    if not (Path(text) / "megatron_laer").is_dir():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no checkout of this repository")
    return Path(text).resolve()


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        write_file(path, json.dumps(content, indent=1) + "\n")
