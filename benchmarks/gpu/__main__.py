"""All parts of the GPU check, which `scripts/gpu_check.sh` starts.

A part is a process group of its own, with its own log and limit, so that it has the card's memory
for itself and leaves nothing behind. Its failure is reported after the others have run; results
that it has written by then count. At the end come the figures that matter most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from benchmarks.command_line import program, write_json
from benchmarks.gpu.headline import headline
from benchmarks.gpu.report import DRY, LABELLED, Part, about, page_rows, show
from megatron_laer.files.checks import refuse_unusable_folder
from megatron_laer.files.writing import write_file
from megatron_laer.support.torch_version import problem_on_cuda
from megatron_laer.tools.cli.argument_types import between, number, path
from megatron_laer.tools.cli.program import Parser

_ROOT = Path(__file__).resolve().parents[2]
# Time that a part's processes need besides measurements, and slack of the last one.
_SPARE_S, _SPARE_ON_RANKS_S = 15.0, 40.0
_LAST_S = 30.0
_DRY_S = 600.0


@dataclass(frozen=True)
class Task:
    """One process of the check.

    A part `name` may have several tasks. `share` is the weight of the task's time; with one of
    `ranks` it runs without torchrun. `limit_s` is added to its time before it is ended.
    """

    name: str
    module: str
    share: float
    ranks: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()
    limit_s: float = 120.0

    @property
    def title(self) -> str:
        """Return the name, with the differences between tasks of one name."""
        more = [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return " ".join([self.name, *more, *("=".join(pair) for pair in self.environment)])


# In the order of risk: wrong gradients first, then failures late in a run, then times that decide.
# The shares of time count on an H100.
_TASKS = (
    Task(
        *("tests", "benchmarks.gpu.card_tests", 2),
        arguments=("tests/gpu/test_kernels.py", "tests/gpu/test_host_waits.py"),
    ),
    Task("gradients", "tests.parity.under_delay", 4, ranks=2),
    Task("first-replica", "benchmarks.gpu.first_replica", 1, ranks=2),
    Task("workloads", "benchmarks.gpu.workloads", 6, ranks=2),
    Task("overlap", "benchmarks.gpu.overlap", 0.5, ranks=2),
    Task("communicators", "benchmarks.gpu.communicators", 0.5, ranks=2),
    *(
        Task(
            *("connections", "benchmarks.gpu.connections", 1, 2),
            (("CUDA_DEVICE_MAX_CONNECTIONS", number),),
        )
        for number in ("32", "8", "1")
    ),
    Task("kernels", "benchmarks.gpu.kernels", 1),
    Task("gemms", "benchmarks.gpu.gemms", 3),
    Task("priorities", "benchmarks.gpu.priorities", 0.5),
    Task("layer", "benchmarks.gpu.layer", 4),
    Task("parity", "tests.parity.launched", 2, ranks=2),
    # Each of its tests starts ranks of its own, so it takes more time than all others.
    Task(
        *("modes", "benchmarks.gpu.card_tests", 4, 2),
        arguments=("tests/gpu/test_training.py", "tests/gpu/test_fp8_experts.py"),
    ),
)
PARTS = tuple(dict.fromkeys(task.name for task in _TASKS))
_ALONE = "modes"
_ON_RANKS = {task.name for task in _TASKS if task.ranks > 1}
_PARITY_RANKS = (2, 4, 8)


def tasks(parts: Sequence[str], ranks: int, nodes: int, *, dry: bool) -> list[Task]:
    """Return the tasks of these parts, in the order of risk."""
    found: list[Task] = []
    for task in _TASKS:
        if task.name not in parts or ranks < task.ranks:
            continue
        if task.ranks == 1:
            found.append(task)
        elif task.name == "modes":  # its tests start processes of their own
            more = ("--collect-only",) * dry  # they need Transformer Engine
            found.append(replace(task, ranks=1, arguments=(*task.arguments, *more)))
        elif task.name == "parity":
            sizes = [size for size in _PARITY_RANKS if size <= ranks and size % nodes == 0]
            found += [replace(task, ranks=size) for size in sizes]
        elif not (dry and task.name == "connections" and found[-1].name == "connections"):
            found.append(replace(task, ranks=ranks))
    return found


def launch(task: Task, options: argparse.Namespace) -> list[str]:
    """Return the words that start a task's Python, up to its module's arguments."""
    module = ["-m", *[LABELLED] * options.dry_run, task.module]
    if task.ranks == 1:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(task.ranks // options.nodes)]
    if options.nodes == 1:
        return [sys.executable, *torchrun, "--standalone", *module]
    nodes = str(options.nodes)
    on_node = 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'
    return [
        *("srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"),
        *("--kill-on-bad-exit=1", "--export=ALL", "bash", "-c", on_node, sys.executable),
        *(*torchrun[2:], "--nnodes", nodes, "--master-addr", options.address),
        *("--master-port", str(options.port), *module),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return 1 if a part failed, 2 if it cannot run here."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    parts = [name for name in PARTS if name != _ALONE or options.dry_run]
    parts = options.parts.split(",") if options.parts else parts
    if (problem := refusal(options, parts)) is not None:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    minutes = options.minutes or (9.0 if options.ranks == 1 else 18.0)
    end_s = time.monotonic() + 60 * minutes - _LAST_S
    left = tasks(parts, options.ranks, options.nodes, dry=options.dry_run)
    result: dict[str, Any] = {"about": about(["scripts/gpu_check.sh", *given]), "parts": {}}
    failed = []
    with _data(options, any(task.ranks > 1 for task in left)) as data:
        while left:
            share_s = end_s - time.monotonic()
            spare_s = _SPARE_S if left[0].ranks == 1 else _SPARE_ON_RANKS_S
            seconds = share_s * left[0].share / sum(task.share for task in left) - spare_s
            # A dry run measures no speed, and must run everything.
            seconds = _DRY_S if options.dry_run else seconds
            task = left.pop(0)
            print(f"== {task.title}", flush=True)
            found = run(task, options, data, max(seconds, 1.0))
            if found.problems:
                failed.append(task.title)
            show(found, options.dry_run)
            result["parts"][task.title] = asdict(found)
            _write(options.output, result)
    print(f"== what matters most ({DRY})" if options.dry_run else "== what matters most")
    for name, value in headline(result["parts"]):
        print(f"{name}: {value}")
    print(f"written: {options.output / 'result.json'} and {options.output / 'rows.md'}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


def run(task: Task, options: argparse.Namespace, data: str, seconds: float) -> Part:
    """Run one task; problems are its own, and that of its process."""
    name = task.title.replace(" ", "-")
    json_file, log = options.output / f"{name}.json", options.output / f"{name}.log"
    json_file.unlink(missing_ok=True)
    words = [*launch(task, options), *task.arguments]
    words += ["--seconds", f"{seconds:.0f}", "--json", str(json_file.resolve())]
    words += ["--data", data] * (task.ranks > 1) + ["--dry-run"] * options.dry_run
    environment = {**os.environ, **dict(task.environment), "PYTHONPATH": _python_path()}
    # Runs end by their own budget; this limit is for those that hang.
    limit_s = seconds + task.limit_s
    with log.open("w") as output:
        status = _status_of(words, environment, output, limit_s)
    part, problem = Part(), None
    if json_file.exists():
        part = Part(**json.loads(json_file.read_text()))
    if status is None:
        problem = f"{task.title} was ended after {limit_s:.0f} s"
    elif status:
        problem = f"{task.title} failed with status {status}"
    elif not json_file.exists():
        problem = f"{task.title} wrote no result"
    if problem is not None:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        part.problems.append(f"{problem}; its output is in {log}")
    return part


def _status_of(
    words: Sequence[str], environment: dict[str, str], output: IO[str], limit_s: float
) -> int | None:
    """Return a program's status, or None if it took too long; leave none of its processes."""
    process = subprocess.Popen(
        words, env=environment, cwd=_ROOT, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        # torchrun's ranks lead sessions of their own.
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # also if only others of its group are left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def refusal(options: argparse.Namespace, parts: Sequence[str]) -> str | None:
    """Return the reason why this machine cannot run the check as requested, or None.

    Raises ValueError for an unusable output folder.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        return f"--parts {unknown[0]} is no part; take some of {','.join(PARTS)}"
    alone = [part for part in parts if part in _ON_RANKS]
    if options.parts and alone and options.ranks == 1:
        return f"--parts {alone[0]} needs several ranks; give --ranks N as well"
    if options.ranks % options.nodes:
        return f"--ranks {options.ranks} are not equally many on each of {options.nodes} nodes"
    if options.nodes > 1 and options.address is None:
        return f"--nodes {options.nodes} needs --address; submit scripts/slurm/gpu_check.sbatch"
    refuse_unusable_folder(options.output, "--output")
    if options.dry_run:
        return None
    if not torch.cuda.is_available():
        return "torch sees no card; run this on a machine with one, or give --dry-run"
    if (problem := problem_on_cuda(torch.__version__)) is not None:
        return problem
    cards, here = torch.cuda.device_count(), options.ranks // options.nodes
    if here > cards:
        return f"--ranks {options.ranks} needs {here} cards on a node, and this one has {cards}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpu_check", description="What a card shows.")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a labelled CPU")
    parser.add_argument(
        "--parts", help=f"some of {','.join(PARTS)}; default: all but {_ALONE}, which takes 30 min"
    )
    parser.add_argument(
        "--ranks", type=between(1, 2**16), default=1, help="cards, of all nodes together"
    )
    parser.add_argument(
        "--nodes", type=between(1, 2**16), default=1, help="set by the Slurm script"
    )
    parser.add_argument("--address", help="of the first node, likewise")
    parser.add_argument("--port", type=between(1, 2**16 - 1), default=29500, help="there, likewise")
    parser.add_argument("--minutes", type=number(0.1, 10**5), help="default: 9, with --ranks 18")
    parser.add_argument("--output", type=path, default=_ROOT / "gpu-check", help="a folder")
    return parser


@contextlib.contextmanager
def _data(options: argparse.Namespace, is_needed: bool) -> Iterator[str]:
    prefix = options.output.resolve() / "data" / "text"
    if is_needed and not prefix.with_suffix(".idx").exists():
        from megatron_laer.tools.data import default_text_sources, prepare_data

        prefix.parent.mkdir(exist_ok=True)
        prepare_data(default_text_sources()[:150], str(prefix), progress=False)
    yield str(prefix)


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "result.json", result)
    write_file(folder / "rows.md", page_rows(result))


def _python_path() -> str:
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    program("gpu_check", main)
