"""Runs many commands, each in a process of its own, which costs their imports once.

A program: `python -m tests.bad_inputs.forks`. It imports all that the commands need, then reads
lines of JSON (`words`, `environment`, `folder`) and forks a child for each, two at a time; a child
runs `cli.main(words)`, or a program of the repository, and is killed at a limit. It answers with a
line of JSON for each, in order.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import python_path

CPU_S = 10
RESIDENT_BYTES = 2 * 2**30
# A guard against waiting for ever; nothing is concluded from how long a case takes.
WALL_S = 120
AT_ONCE = 2
_TOO_LARGE = f"{RESIDENT_BYTES:,} bytes resident"

ROOT = Path(__file__).resolve().parents[2]

_IMPORTED = (
    *(f"benchmarks.{path.stem}" for path in ROOT.glob("benchmarks/*.py")),
    "benchmarks.gpu.__main__",
    "matplotlib.backend_bases",
    "matplotlib.figure",
    "megatron_laer.cli.flags",
    "megatron_laer.cli.inspect",
    "megatron_laer.cli.plan",
    "megatron_laer.cli.prepare_data",
    "megatron_laer.cli.report",
    "megatron_laer.cli.simulate",
    "megatron_laer.inspection",
    "megatron_laer.runtime.planning.planner_checkpoint",
)


@dataclass(frozen=True)
class Job:
    """One command line of `megatron_laer`, in a folder, with these variables changed.

    Attributes:
        words: the first one may be a program of this repository, by its path from the top.
    """

    words: Sequence[str]
    folder: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        limit: what it was stopped by, or "".
        status: its exit status; negative if a signal ended it.
    """

    status: int
    output: str
    errors: str
    limit: str
    cpu_s: float
    resident_bytes: int


def run_all(jobs: Iterable[Job]) -> Iterator[Ended]:
    """Yield how each job ended, in order."""
    lines = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as given:
        given.write(lines)
        given.seek(0)
        server = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.bad_inputs.forks"],
            env=os.environ
            | one_thread
            | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"},
            stdin=given,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    for line in server.stdout.splitlines():
        if line.startswith("{"):
            yield Ended(**json.loads(line))


# The program.


def _serve() -> None:
    # Imports and their warnings may print.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from megatron_laer.launch import prepare

    prepare()
    for name in _IMPORTED:
        importlib.import_module(name)
    sys.path.insert(0, str(ROOT))
    importlib.import_module("pretrain_gpt")
    jobs = [Job(**json.loads(line)) for line in sys.stdin]
    with tempfile.TemporaryDirectory() as folder:
        children: dict[int, _Child] = {}
        ended: dict[int, Ended] = {}
        waiting = list(enumerate(jobs))
        while waiting or children:
            while waiting and len(children) < AT_ONCE:
                number, job = waiting.pop(0)
                children[number] = _Child(job, Path(folder) / str(number))
            for number, child in list(children.items()):
                result = child.poll()
                if result is not None:
                    ended[number] = result
                    del children[number]
            time.sleep(0.005)
        for number in range(len(jobs)):
            answers.write(json.dumps(asdict(ended[number])) + "\n")


class _Child:
    """One job's process, watched."""

    def __init__(self, job: Job, files: Path) -> None:
        self._output, self._errors = files.with_suffix(".out"), files.with_suffix(".err")
        self._limit = ""
        self._deadline_s = time.monotonic() + WALL_S
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run_job(job, self._output, self._errors)

    def poll(self) -> Ended | None:
        """How it ended, if it has; stops it at a limit."""
        pid, status, usage = os.wait4(self._pid, os.WNOHANG)
        if pid == 0:
            self._stop_at_limit()
            return None
        code = os.waitstatus_to_exitcode(status)
        resident = usage.ru_maxrss * 1024
        if code == -signal.SIGXCPU:
            self._limit = f"{CPU_S} s of processor time"
        elif resident > RESIDENT_BYTES:
            self._limit = _TOO_LARGE
        return Ended(
            status=code,
            output=self._output.read_text(errors="replace"),
            errors=self._errors.read_text(errors="replace"),
            limit=self._limit,
            cpu_s=usage.ru_utime + usage.ru_stime,
            resident_bytes=resident,
        )

    def _stop_at_limit(self) -> None:
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
            if pages * resource.getpagesize() > RESIDENT_BYTES:
                # Said here, since the kernel may count a little less once a child has ended.
                self._limit = _TOO_LARGE
                os.kill(self._pid, signal.SIGKILL)
        if time.monotonic() > self._deadline_s:
            self._limit = f"the guard of {WALL_S} s"
            os.kill(self._pid, signal.SIGKILL)


def _run_job(job: Job, output: Path, errors: Path) -> NoReturn:
    """In the child: run the command, and exit as Python would."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        os.chdir(job.folder)
        os.environ.update(job.environment)
        sys.argv[:] = ["megatron-laer", *job.words]
        status = _status_of(job.words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _status_of(words: Sequence[str]) -> int:
    from megatron.training import training

    from megatron_laer import cli

    def accepted(*args: Any, **kwargs: Any) -> NoReturn:
        print("the settings were accepted", file=sys.stderr)
        raise SystemExit(0)

    # What a script of `train` calls when its arguments are valid.
    sys.modules["megatron.training"].pretrain = training.pretrain = accepted
    try:
        if words[:1] and words[0].endswith(".py"):
            sys.argv[:] = [str(ROOT / words[0]), *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        return cli.main(words)
    except SystemExit as stopped:  # as Python itself does with it
        if isinstance(stopped.code, int):
            return stopped.code
        if stopped.code is not None:
            print(stopped.code, file=sys.stderr)
        return int(stopped.code is not None)


if __name__ == "__main__":
    _serve()
