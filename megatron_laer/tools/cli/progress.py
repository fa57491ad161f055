"""Progress of commands on stderr: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# Seconds before the first plain line, and between lines.
EVERY_S = 5.0
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far{postfix}"


def bar(title: str, **more: Any) -> Callable[..., Any]:
    """Return a function that wraps items in a progress bar, or makes one without items."""
    if not is_terminal():
        delay_s = max(EVERY_S - (time.monotonic() - _Lines.last_s), 0.0)
        plain = {"file": _Lines(), "bar_format": _LINE, "leave": False, "delay": delay_s}
        more |= plain | {"mininterval": EVERY_S, "disable": sys.stderr is None}
    return lambda items=None: tqdm(items, desc=title, **more)


@contextmanager
def working(on: str) -> Iterator[None]:
    """Name the work in the block at once on a terminal, elsewhere after some seconds."""

    stderr = sys.stderr  # not one that the block redirects it to

    def say() -> None:
        if stderr is not None:
            print(f"{on}, which takes some seconds", file=stderr, flush=True)

    timer = threading.Timer(EVERY_S, say)
    timer.daemon = True
    if is_terminal():
        say()
    else:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class _Lines:
    """File of tqdm that writes each state of a bar on a line of its own, without blank ones.

    `last_s` is the time of the last line of all bars, at first of the start.
    """

    last_s = time.monotonic()

    def write(self, text: str) -> None:
        if sys.stderr is not None and (line := text.strip("\r\n ")):
            sys.stderr.write(f"{line}\n")
            _Lines.last_s = time.monotonic()

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()
