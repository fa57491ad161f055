"""Helper processes: they hear no signals, and end with the process that started them.

A launcher that stops a job signals all its processes. A rank has a handler for that. A helper
started through `multiprocessing` has none and would die at once, with the work that the rank still
needs it for. Imports neither torch nor Megatron, since helpers import this module too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker, util
from unittest import mock


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals in this thread within the context, and for good in processes started there.

    They are blocked, not ignored: this process gets them after the context. A helper started here
    can end by SIGKILL and by its own return, not by `terminate`.
    """
    every = signal.valid_signals()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        # The first spawned process starts multiprocessing's tracker, after which some releases of
        # Python unblock two of the signals.
        _start_tracker()
        signal.pthread_sigmask(signal.SIG_BLOCK, every)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start multiprocessing's tracker, if it does not run, in a session of its own.

    It removes the names of semaphores in /dev/shm once all who use them have ended. A launcher
    that kills a rank's session would otherwise kill it first.
    """
    with mock.patch.object(util, "spawnv_passfds", _start_apart):
        resource_tracker.ensure_running()


def _start_apart(program: bytes | str, words: Sequence[bytes | str], fds: Sequence[int]) -> int:
    started = subprocess.Popen(
        words, executable=program, pass_fds=fds, close_fds=True, start_new_session=True
    )
    _trackers.append(started)
    return started.pid


# Kept, since a deleted one warns that its process runs.
_trackers: list[subprocess.Popen[bytes]] = []


def end_with_parent() -> None:
    """End this helper as soon as its parent has ended, for any reason.

    Processes that the parent forked since must end first: they hold the pipe that has to close.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("a process that multiprocessing did not start has no parent to watch")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
