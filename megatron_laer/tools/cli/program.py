"""Exit statuses and one-line errors of commands and benchmarks."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megatron_laer.environment import variables_behind
from megatron_laer.files.checks import in_one_line, one_line, quoted, reason
from megatron_laer.files.shipped import did_you_mean

# Statuses as shells report them for a process that a signal ended.
_INTERRUPTED = 128 + signal.SIGINT
_NO_READER = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """Parser whose errors take one line, without the usage, and suggest the word that was meant."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        # From Python 3.14 on argparse suggests by itself, with `suggest_on_error`.
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            words = [*map(str, action.choices or ())]
            if not action.option_strings:  # `help` for a command
                words += self._option_string_actions
            error.message += did_you_mean(str(value), words)
            raise

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


class RaisingParser(argparse.ArgumentParser):
    """Parser of another program's flags, whose errors are ValueErrors."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def describe(parser: argparse.ArgumentParser, text: str, examples: str) -> None:
    parser.description, parser.epilog = textwrap.fill(text, 79), examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def ended(name: str, run: Callable[[], int]) -> int:
    """Run a program and return its exit status.

    2 is for errors that the user can correct, with one line on stderr that begins with `name`; 130
    for Ctrl-C. 141, without a line, is for a reader of the output that has gone, such as `head`.
    """
    try:
        try:
            return _status(name, run)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    except OSError as error:
        _discard_output()
        return failed(name, f"the output cannot be written: {reason(error)}")


def failed(name: str, problem: str, status: int = 2) -> int:
    print(one_line(f"{name}: {problem}"), file=sys.stderr)
    return status


def _status(name: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        return failed(name, "interrupted", _INTERRUPTED)
    except BrokenPipeError:
        raise
    except MemoryError:
        return failed(name, "the memory of this process does not suffice")
    except UnicodeEncodeError as error:
        where = slice(max(error.start - 20, 0), error.end)
        return failed(name, f"{quoted(error.object[where])} cannot be written in {error.encoding}")
    except Exception as error:
        variables = [f"{key}={quoted(value)}" for key, value in variables_behind(error).items()]
        if variables:
            return failed(name, f"{', '.join(variables)}: {error}; correct or unset it")
        if isinstance(error, ValueError | OSError | ImportError):
            return failed(name, in_one_line(error))
        raise


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def escape_warnings() -> None:
    """Print each warning, which may quote a file's name, escaped on one line."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())


@contextmanager
def stopped_by_exceptions() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP in the block, so that its `finally` clauses run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # A signal that is ignored, as under nohup, stays ignored.
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


def _discard_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
