"""Helper processes ignore signals, end with their parent, and lose none of its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import is_running, outlive, python_path

# Starts a manager as the checkpoint writer does, after waiting for a line, so that a signal may
# come first. Prints the ids of its children, then sends each line through the manager.
PARENT = """
import multiprocessing, signal, sys
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from megatron_laer.helper_processes import end_with_parent, signals_blocked

if __name__ == "__main__":
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    manager = SyncManager(ctx=multiprocessing.get_context(sys.argv[1]))
    with signals_blocked():
        print("starting", flush=True)
        sys.stdin.readline()
        manager.start(initializer=end_with_parent)
        assert heard == []
    assert heard == [signal.SIGTERM]
    print(manager._process.pid, resource_tracker._resource_tracker._pid, flush=True)
    queue = manager.Queue()
    for line in sys.stdin:
        queue.put(line)
        print(queue.get(), end="", flush=True)
"""


@contextmanager
def parent_with_manager(
    folder: Path, method: str
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Return a process that got SIGTERM while it started a manager, and its children."""
    script = folder / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), method],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            assert parent.stdin is not None and parent.stdout is not None
            assert parent.stdout.readline() == "starting\n"
            parent.send_signal(signal.SIGTERM)
            parent.stdin.write("start\n")
            parent.stdin.flush()
            manager, tracker = map(int, parent.stdout.readline().split())
            yield parent, [manager, tracker]
        finally:
            parent.kill()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_no_signal_but_a_kill_ends_a_helper(tmp_path: Path, method: str) -> None:
    with parent_with_manager(tmp_path, method) as (parent, helpers):
        for helper in helpers:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(helper, number)
        returned, _ = parent.communicate("a\nb\n", timeout=600.0)
        assert (returned, parent.returncode) == ("a\nb\n", 0)
    assert outlive(helpers) == [], "they were told to end"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_helper_ends_with_its_killed_parent(tmp_path: Path, method: str) -> None:
    with parent_with_manager(tmp_path, method) as (parent, helpers):
        assert all(map(is_running, helpers))
        parent.kill()
        assert outlive(helpers) == []
