"""Supervisor that runs pytest and ends with it: `python -m tests.supervise <pytest's arguments>`.

After its summary pytest's process may wait for threads and children, and readers of our output wait
for every process that holds it. So pytest runs as a child that writes its status to a file; some
time later all remaining processes are ended. Some end by themselves just after pytest, such as the
fork server of ranks, whose imports take half a second to unload. They have time for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

STATUS_VARIABLE = "MEGATRON_LAER_TEST_STATUS"
GRACE_S = 30.0
ENDING_S = 20.0
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str], grace_s: float = GRACE_S, ending_s: float = ENDING_S) -> int:
    """Run pytest and return its exit status, soon after its summary.

    Its process has `grace_s` seconds to end, and what it started `ending_s` more.
    """
    # Orphans of pytest's children become children of this process, and are found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "status"
        pytest = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "tests.supervise", *arguments],
            env=os.environ | {STATUS_VARIABLE: str(path)},
        )
        try:
            status = _wait(pytest, path, grace_s)
        finally:
            pytest.kill()
            _end_what_is_left(ending_s)
    return status


def _wait(pytest: subprocess.Popen[bytes], path: Path, grace_s: float) -> int:
    deadline_s = float("inf")
    while time.monotonic() < deadline_s:
        try:
            return pytest.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if path.exists() and deadline_s == float("inf"):
                deadline_s = time.monotonic() + grace_s
        except KeyboardInterrupt:
            # The terminal signalled pytest too, which is now tearing down and printing.
            deadline_s = min(deadline_s, time.monotonic() + 2 * grace_s)
    print(f"pytest did not end {grace_s:.0f} s after its last word and is killed", file=sys.stderr)
    return int(path.read_text()) if path.exists() else 2


def _end_what_is_left(ending_s: float) -> None:
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=ending_s)
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                print(f"left behind, and killed: {' '.join(process.cmdline())}", file=sys.stderr)
            process.kill()
    psutil.wait_procs(left, timeout=60.0)


def pytest_sessionfinish(session: object, exitstatus: int) -> None:
    """Remember the status (hook of pytest, whose plugin this module is)."""
    session.config.final_status = int(exitstatus)  # type: ignore[attr-defined]


def pytest_unconfigure(config: object) -> None:
    """Report that the summary is printed (hook of pytest). Its workers load this plugin as well."""
    status = getattr(config, "final_status", None)
    worker = hasattr(config, "workerinput")
    if status is not None and STATUS_VARIABLE in os.environ and not worker:
        path = Path(os.environ[STATUS_VARIABLE])
        written = path.with_suffix(".new")
        written.write_text(str(status))
        written.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
