"""Time limits of what may hang: a test then fails, with what each thread is doing.

Ranks have limits of their own, after which each one's stacks are shown (`RankPool.run`).
"""

from __future__ import annotations

import faulthandler
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Fail what takes longer, on the main thread; end the process if it is in no Python code.

    It fails again every half minute, since hypothesis calls what has failed once more.
    """

    def fail(*_: Any) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        pytest.fail(f"this takes longer than {seconds} s; stacks of all threads:\n{stacks}")

    before = signal.signal(signal.SIGALRM, fail)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
