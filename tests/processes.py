"""Programs that tests start: `subprocess.run` for such as torchrun, which start others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parent.parent


def python_path() -> str:
    """PYTHONPATH with this repository first, and then what is in it: another Megatron, maybe."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(
    command: Sequence[str], timeout_s: float, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end and capture the output; after `timeout_s`, end all descendants as well.

    `subprocess.run` ends the command alone, and then waits for what holds its pipes.

    Raises:
        subprocess.TimeoutExpired: with what was printed so far.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except BaseException:
            for descendant in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def default_signals() -> None:
    """For `preexec_fn`: undo what a shell's background (no SIGINT) or nohup (no SIGHUP) leaves."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def outlive(pids: Iterable[int], within_s: float = 300.0) -> list[int]:
    """Those that run even after some seconds, given that all of them should end."""
    give_up_s = time.monotonic() + within_s
    while True:
        running = [pid for pid in pids if is_running(pid)]
        if not running or time.monotonic() > give_up_s:
            return running
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether a process has not ended; nobody may have asked for its status yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
