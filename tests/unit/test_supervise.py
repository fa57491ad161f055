"""Test runs end with pytest's verdict, even if they leave processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import python_path

# A test that leaves a process in its own session which holds our output, and that keeps pytest's
# process from ending.
STUBBORN = """
import atexit, subprocess, sys, time

def test_that_leaves_a_mess():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(36000)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    open("pid", "w").write(str(child.pid))
    if {hangs}:
        atexit.register(time.sleep, 36000)
    time.sleep({lasts_s})
    assert {passes}
"""


def supervise(
    folder: Path, *arguments: str, grace_s: float, hangs: bool, passes: bool, lasts_s: float = 0.0
) -> tuple[int, str, int]:
    (folder / "test_mess.py").write_text(
        STUBBORN.format(hangs=hangs, passes=passes, lasts_s=lasts_s)
    )
    code = (
        "import sys; from tests.supervise import main; "
        f"sys.exit(main(sys.argv[1:], grace_s={grace_s}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,  # read until all writers close it
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    return result.returncode, result.stdout, int((folder / "pid").read_text())


STATUS = pytest.mark.parametrize(("passes", "status"), [(True, 0), (False, 1)])


@STATUS
@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
def test_the_status_is_pytests_and_nothing_is_left(
    tmp_path: Path, hangs: bool, passes: bool, status: int
) -> None:
    # Processes that end need no grace, and on a busy machine would overrun a short one.
    grace_s = 1.0 if hangs else 600.0
    # With -s, processes of the test inherit our output, as ranks do before they write to logs.
    returned, output, pid = supervise(tmp_path, "-s", grace_s=grace_s, hangs=hangs, passes=passes)
    assert returned == status, output
    assert ("1 passed" if passes else "1 failed") in output
    assert "left behind, and killed" in output
    assert ("did not end" in output) is hangs
    assert not psutil.pid_exists(pid)


@STATUS
def test_the_status_is_that_of_all_workers(tmp_path: Path, passes: bool, status: int) -> None:
    (tmp_path / "test_tidy.py").write_text("def test_that_ends_long_before(): pass")
    workers = ["--numprocesses", "2", "--dist", "loadfile"]
    # The other worker ends at once, which must not start a grace of one second.
    returned, output, pid = supervise(
        tmp_path, *workers, grace_s=1.0, hangs=False, passes=passes, lasts_s=4.0
    )
    assert returned == status, output
    assert ("2 passed" if passes else "1 failed, 1 passed") in output
    assert not psutil.pid_exists(pid)


def test_a_wrong_argument_keeps_pytests_status(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("0")
    returned, output, _ = supervise(
        tmp_path, "--no-such-flag", grace_s=1.0, hangs=False, passes=True
    )
    assert returned == 4, output
