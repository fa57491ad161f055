"""A command that takes too long ends with all processes that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests import processes
from tests.processes import default_signals, outlive, python_path


def test_a_descendant_that_holds_the_output_keeps_nobody_waiting() -> None:
    errors: list[str] = []

    def run() -> None:
        try:
            # As torchrun does with its ranks: a session of its own, and our pipe for output.
            processes.run(["bash", "-c", "setsid sleep 36000 & sleep 36000"], timeout_s=1.0)
        except subprocess.TimeoutExpired as error:
            errors.append(type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(600.0)
    assert errors == ["TimeoutExpired"]


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


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_no_signal_but_a_kill_ends_a_helper(tmp_path: Path, method: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), method],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        assert parent.stdout.readline() == "starting\n"
        parent.send_signal(signal.SIGTERM)
        parent.stdin.write("start\n")
        parent.stdin.flush()
        helpers = [*map(int, parent.stdout.readline().split())]
        assert len(helpers) == 2
        for helper in helpers:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(helper, number)
        returned, _ = parent.communicate("a\nb\n", timeout=600.0)
    assert (returned, parent.returncode) == ("a\nb\n", 0)
    assert outlive(helpers) == [], "they were told to end"


# A test that leaves a process in its own session which holds our output, and that keeps pytest's
# process from ending.
STUBBORN = """
import atexit, subprocess, sys, time

FOR_EVER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(36000)"

def test_that_leaves_a_mess():
    child = subprocess.Popen([sys.executable, "-c", FOR_EVER], start_new_session=True)
    open("pid", "w").write(str(child.pid))
    if {hangs}:
        atexit.register(time.sleep, 36000)
    assert {passes}
"""


@pytest.mark.parametrize(
    ("hangs", "passes"), [(False, False), (True, True)], ids=["ends and fails", "hangs and passes"]
)
def test_the_status_is_pytests_and_nothing_is_left(
    tmp_path: Path, hangs: bool, passes: bool
) -> None:
    (tmp_path / "test_mess.py").write_text(STUBBORN.format(hangs=hangs, passes=passes))
    # Processes that end need no grace, and on a busy machine would overrun a short one.
    code = (
        "import sys; from tests.supervise import main; "
        f"sys.exit(main(sys.argv[1:], grace_s={1.0 if hangs else 600.0}, ending_s=1.0))"
    )
    # With -s, processes of the test inherit our output, as ranks do before they write to logs.
    result = subprocess.run(
        [sys.executable, "-c", code, "-q", "-s", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,  # read until all writers close it
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert result.returncode == int(not passes), result.stdout
    assert ("1 passed" if passes else "1 failed") in result.stdout
    assert "left behind, and killed" in result.stdout
    assert ("did not end" in result.stdout) is hangs
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (("-m", "benchmarks.planner"), ("scripts/paper/figure8.py", "--toy"))


def started(words: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    more = ["--work-dir", str(folder)]
    if words[0] == "-m":
        more = ["--trace", str(folder / "trace.npz")]
        np.savez(more[1], tokens=np.ones((500, 2, 16, 2, 32), dtype=np.int32))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *words, *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: words[-1])
def test_ctrl_c_is_one_line_and_status_130(words: tuple[str, ...], tmp_path: Path) -> None:
    process = started(words, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    name = " ".join(["python", *words] if words[0] == "-m" else words[:1])
    assert errors == f"{name}: interrupted\n"
