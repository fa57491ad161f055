"""Programs that tests start: a `subprocess.run` for programs such as torchrun with children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parent.parent


def python_path() -> str:
    """Return PYTHONPATH with this repository first; it may name another Megatron."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(
    command: Sequence[str], timeout_s: float, stdin: str | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end and capture the output; after `timeout_s`, end all descendants as well.

    `subprocess.run` ends only the command, and then waits for all processes that hold its pipes.
    """
    kwargs |= {"stdin": subprocess.PIPE} if stdin is not None else {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except BaseException:
            for descendant in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _environment(more: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"} | more


def finished(
    *words: object, stdin: str | None = None, cwd: str | Path = _ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python with CUDA replaced to its end."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    return run(command, 1800.0, stdin, env=_environment(environment), cwd=cwd)


def python(*words: object, stdin: str | None = None, **environment: str) -> str:
    """Return the output of a Python that starts in the repository, with CUDA replaced."""
    result = finished(*words, stdin=stdin, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Start a Python with CUDA replaced, pipes, and signals as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, words)],
        env=_environment(environment),
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


def default_signals() -> None:
    """Undo the signals ignored under a shell's background or nohup (for `preexec_fn`)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def outlive(pids: Iterable[int], within_s: float = 300.0) -> list[int]:
    """Return processes that still run after some seconds, given that all should end."""
    give_up_s = time.monotonic() + within_s
    while True:
        running = [pid for pid in pids if is_running(pid)]
        if not running or time.monotonic() > give_up_s:
            return running
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Return True if a process has not ended; a zombie has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
