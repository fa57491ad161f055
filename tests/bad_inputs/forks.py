"""Runner of many commands, each in a process of its own, at the cost of one import.

A program: `python -m tests.bad_inputs.forks`. It imports the commands' modules, then reads lines of
JSON (`Job`) and forks a child for each. A child runs `cli.main(words)`, or a program of the
repository, within limits of the kernel. The answers are lines of JSON, in order. Two such servers
run at once. One of them imports torch and Megatron as well, which makes each fork five times as
long.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import python_path

CPU_S = 10
# Above the memory of the server. A command without memory says so, and so not what a case expects.
MEMORY_BYTES = 2 * 2**30
# A guard against endless waits; no verdict depends on a case's duration.
WALL_S = 120
_LIMITS = {
    signal.SIGXCPU: "its limit of processor time",
    signal.SIGALRM: f"the guard of {WALL_S} s",
}

ROOT = Path(__file__).resolve().parents[2]

# Commands, and prefixes of programs, that import torch.
_NEED_TORCH = ("train", "inspect", "check-recipe", "prepare-data")
_PROGRAMS_WITH_TORCH = ("benchmarks/", "scripts/")
_COMMANDS = {
    path.stem.replace("_", "-"): f"megatron_laer.tools.cli.{path.stem}"
    for path in ROOT.glob("megatron_laer/tools/cli/[a-z]*.py")
}
_IMPORTED = (
    "benchmarks.command_line",
    "megatron_laer.telemetry.log",
    *(module for name, module in _COMMANDS.items() if name not in _NEED_TORCH),
)
_IMPORTED_WITH_TORCH = (
    *(f"benchmarks.{path.stem}" for path in ROOT.glob("benchmarks/*.py")),
    "benchmarks.gpu.__main__",
    *_COMMANDS.values(),
    "megatron_laer.tools.inspection",
    "megatron_laer.runtime.planning.planner_checkpoint",
    "pretrain_gpt",
)


@dataclass(frozen=True)
class Job:
    """One command line of `megatron_laer`, or of a program of the repository by its path from the
    top.

    It runs in a folder with these variables changed, within `cpu_s` of processor time.
    """

    words: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    cpu_s: int = CPU_S

    @property
    def needs_torch(self) -> bool:
        """Return True if its imports would take seconds in a child."""
        first = self.words[0] if self.words else ""
        is_program = first.startswith(_PROGRAMS_WITH_TORCH) and first.endswith(".py")
        return is_program or first in _NEED_TORCH


@dataclass(frozen=True)
class Ended:
    """End of a command: its status, negative after a signal, and the limit that stopped it."""

    status: int
    output: str
    errors: str
    limit: str


def run_all(jobs: Iterable[Job]) -> Iterator[Ended]:
    jobs = list(jobs)
    with ThreadPoolExecutor(2) as threads:
        light, heavy = threads.map(
            _served,
            ([job for job in jobs if job.needs_torch is needs] for needs in (False, True)),
            ("light", "heavy"),
        )
    for job in jobs:
        yield (heavy if job.needs_torch else light).pop(0)


def _served(jobs: Sequence[Job], kind: str) -> list[Ended]:
    if not jobs:
        return []
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    server = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bad_inputs.forks", kind],
        env=os.environ | threads | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"},
        input="".join(json.dumps(asdict(job)) + "\n" for job in jobs),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Ended(**json.loads(line)) for line in server.stdout.splitlines() if line[:1] == "{"]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "heavy":
        from megatron_laer.launch import prepare

        prepare()
        for name in _IMPORTED_WITH_TORCH:
            importlib.import_module(name)
    for name in _IMPORTED:
        importlib.import_module(name)
    jobs = [Job(**json.loads(line)) for line in sys.stdin]
    gc.collect()
    gc.freeze()  # otherwise each child would copy memory that its collector scans
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        for job in jobs:
            pid = os.fork()
            if pid == 0:
                _run_job(job, output, errors)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = (path.read_text(errors="replace") for path in (output, errors))
            ended = Ended(status, *texts, _LIMITS.get(-status, ""))
            answers.write(json.dumps(asdict(ended)) + "\n")


def _run_job(job: Job, output: Path, errors: Path) -> NoReturn:
    """Run the command in the child, and exit as Python would."""
    status = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (job.cpu_s, job.cpu_s + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # of the test's own limit
        signal.alarm(WALL_S)
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        os.chdir(job.folder)
        os.environ.update(job.environment)
        sys.argv[:] = ["megatron-laer", *job.words]
        if job.words[:1] and job.words[0].endswith(".sbatch"):
            os.execvp("bash", ["bash", str(ROOT / job.words[0]), *job.words[1:]])
        status = _status_of(job.words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _accept_settings() -> None:
    """End a script of `train` when its arguments are valid."""
    from megatron.training import training

    def accepted(*args: Any, **kwargs: Any) -> NoReturn:
        print("the settings were accepted", file=sys.stderr)
        raise SystemExit(0)

    sys.modules["megatron.training"].pretrain = training.pretrain = accepted


def _answer_the_doctor() -> None:
    """Make its imports fail with a text that must not reach a terminal."""
    from megatron_laer.tools import doctor

    future: Future[dict[str, Any]] = Future()
    future.set_result({"error": "\x1b[2J\n\r\u202eok"})
    doctor.asked = lambda questions: contextlib.nullcontext(dict.fromkeys(questions, future))


def _status_of(words: Sequence[str]) -> int:
    from megatron_laer.tools import cli
    from megatron_laer.tools.cli import progress

    progress.EVERY_S = 1e6  # a slow machine adds no line
    if words[:1] == ["train"]:
        _accept_settings()
    elif words[:1] == ["doctor"]:
        _answer_the_doctor()
    try:
        if words[:1] and words[0].endswith(".py"):
            sys.argv[:] = [str(ROOT / words[0]), *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        return cli.main(words)
    except SystemExit as stopped:  # as Python itself handles it
        if isinstance(stopped.code, int):
            return stopped.code
        if stopped.code is not None:
            print(stopped.code, file=sys.stderr)
        return int(stopped.code is not None)


if __name__ == "__main__":
    _serve()
