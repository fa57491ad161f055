"""A command that takes too long ends with all processes that it started."""

from __future__ import annotations

import subprocess
import threading

from tests import processes


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


def test_status_and_output_are_the_commands() -> None:
    result = processes.run(["bash", "-c", "echo out; echo err >&2; exit 3"], timeout_s=600.0)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")
