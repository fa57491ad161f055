"""Helper processes hear no signal, and end with the process that started them.

A launcher that stops a job signals every process of it. A rank has a handler then; a helper that it
started through `multiprocessing` has none, dies at once, and takes down what the rank does next.
Imports neither torch nor Megatron, since helpers import this module too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals: for good in what is started in this context, in this thread until its end.

    Blocked, not ignored: a signal that comes meanwhile is kept for this process. A helper that is
    started in here can be ended by SIGKILL and by its own return, not by `terminate`.
    """
    every = signal.valid_signals()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        # The first process that is spawned starts multiprocessing's tracker on its way, after which
        # some releases of Python unblock two of the signals.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, every)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let this helper end as soon as its parent has, however that ended.

    Where the parent has forked other processes since, once they have ended too: they hold the pipe
    whose closing tells.

    Raises:
        RuntimeError: this process was not started by `multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("a process that multiprocessing did not start has no parent to watch")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
