"""Questions that need an import or another program are answered by processes that start here.

`probes.py` has the imports. A process that hangs, or that prints without end, is stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_laer.tools.doctor.row import Answer

# A cold import from a network's file system takes minutes; longer, and it hangs.
_TIMEOUT_S = 600.0
# A compiler says its version at once; from a network's file system in seconds.
_PROGRAM_S = 60.0
_MOST_BYTES = 2**16


@contextlib.contextmanager
def asked(questions: Mapping[str, list[str]]) -> Iterator[dict[str, Future[Answer]]]:
    """Ask each question in a process of its own, beside the block; answers by questions' keys."""
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        yield {key: threads.submit(_ask, question) for key, question in questions.items()}
    finally:
        threads.shutdown(cancel_futures=True)


def program_says(command: Sequence[str]) -> str | None:
    """Return what a program prints; None if it cannot be started, fails, or does not end in time.

    Only the beginning of a long output is returned.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None
    with process:
        try:
            said = _read(process, time.monotonic() + _PROGRAM_S)
        finally:
            # With the processes that it has started, which may hold the pipe.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return None if said is None else said.decode(errors="replace").strip()


def _read(process: subprocess.Popen[bytes], deadline_s: float) -> bytes | None:
    assert process.stdout is not None
    said = b""
    while len(said) < _MOST_BYTES:
        left_s = max(0.0, deadline_s - time.monotonic())
        if not select.select([process.stdout], [], [], left_s)[0]:
            return None
        piece = os.read(process.stdout.fileno(), _MOST_BYTES)
        if not piece:
            break
        said += piece
    else:
        return said
    try:
        return said if process.wait(max(0.0, deadline_s - time.monotonic())) == 0 else None
    except subprocess.TimeoutExpired:
        return None


def _ask(question: list[str]) -> Answer:
    """Ask a process that finds modules where this one does."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from megatron_laer.tools.doctor import probes; probes.main()"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), *question]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"its import did not end within {_TIMEOUT_S:.0f} s"}
    except OSError as error:
        return {"error": f"{sys.executable} does not start ({error.strerror})"}
    try:
        answer: Answer = json.loads(result.stdout)
    except ValueError:
        status = result.returncode
        said = result.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return {"error": f"its import ended Python with {how}{last and f' ({last})'}"}
    return answer
