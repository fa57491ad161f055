"""This file starts the processes that answer what only an import can tell (`probes.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from megatron_laer.doctor.row import Answer

# A cold import from a network's file system takes minutes; longer, and it hangs.
_TIMEOUT_S = 600.0


def answers_to(questions: Mapping[str, list[str]]) -> dict[str, Answer]:
    """Return the answers by the keys of the questions, each asked in a process of its own."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(questions, threads.map(_ask, questions.values()), strict=True))


def _ask(question: list[str]) -> Answer:
    """Return the answer of a process that finds modules where this one does."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from megatron_laer.doctor import probes; probes.main()"
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
