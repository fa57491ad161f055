"""A command that takes too long ends with all processes that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_laer.helper_processes import signals_blocked
from tests import processes
from tests.limits import limited


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


def test_a_signal_waits_while_helpers_start() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


FIGURE = "scripts/paper/figure8.py"


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    process = processes.start(FIGURE, "--toy", "--work-dir", tmp_path, PYTHONUNBUFFERED="1")
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, f"{FIGURE}: interrupted\n")


def test_what_hangs_fails_with_the_stacks_of_its_threads(tmp_path: Path) -> None:
    """Wait in a loop, and in a call of the system; the test's own limit is set again after each."""

    def loop() -> None:
        while True:
            pass

    def wait_for_a_writer() -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "pipe").read_bytes()

    alarm = signal.getsignal(signal.SIGALRM)
    for hang in (loop, wait_for_a_writer):
        said = rf"(?s)0\.2 s;.* in {hang.__name__}\n"
        with pytest.raises(pytest.fail.Exception, match=said), limited(0.2):
            hang()
        assert signal.getsignal(signal.SIGALRM) is alarm
