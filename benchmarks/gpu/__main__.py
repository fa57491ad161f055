"""All parts of the GPU check, which `scripts/gpu_check.sh` starts.

A part is a process of its own, so that it has the card's memory for itself. Its failure is reported
after the others have run. Parts are named for which time does not suffice.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.command_line import program, write_json
from benchmarks.gpu.report import Part, about, page_rows, show
from megatron_laer.files.checks import refuse_unusable_folder
from megatron_laer.files.writing import write_file
from megatron_laer.support.torch_version import problem_on_cuda
from megatron_laer.tools.cli.argument_types import between, number, path
from megatron_laer.tools.cli.program import Parser

_ROOT = Path(__file__).resolve().parents[2]
_CONNECTIONS = ("1", "8", "32")
_PARITY_RANKS = (2, 4, 8)
# Time that a part's processes need besides measurements, and slack of the last one.
_SPARE_S, _SPARE_ON_RANKS_S = 15.0, 40.0
_LAST_S = 30.0
_DRY_S = 600.0


@dataclass(frozen=True)
class Task:
    """One process of the check.

    A part `name` may have several tasks. `share` is the weight of the task's time; with one of
    `ranks` it runs without torchrun.
    """

    name: str
    module: str
    share: float
    ranks: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """Return the name, with the differences between tasks of one name."""
        more = [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return " ".join([self.name, *more, *("=".join(pair) for pair in self.environment)])


_ON_ONE_CARD = (
    Task("tests", "", 2),
    Task("kernels", "benchmarks.gpu.kernels", 1),
    Task("gemms", "benchmarks.gpu.gemms", 3),
    Task("priorities", "benchmarks.gpu.priorities", 0.5),
    Task("layer", "benchmarks.gpu.layer", 4),
)
_ON_RANKS = ("parity", "communicators", "connections", "workloads")
PARTS = (*(task.name for task in _ON_ONE_CARD), *_ON_RANKS)


def tasks(parts: Sequence[str], ranks: int, nodes: int, *, dry: bool) -> list[Task]:
    found = [task for task in _ON_ONE_CARD if task.name in parts]
    if ranks == 1:
        return found
    found += [
        Task("parity", "tests.parity.launched", 2, size)
        for size in _PARITY_RANKS
        if "parity" in parts and size <= ranks and size % nodes == 0
    ]
    if "communicators" in parts:
        found.append(Task("communicators", "benchmarks.gpu.communicators", 0.5, ranks))
    if "connections" in parts:
        found += [
            Task(
                *("connections", "benchmarks.gpu.connections", 1, ranks),
                (("CUDA_DEVICE_MAX_CONNECTIONS", number),),
            )
            for number in (_CONNECTIONS[:1] if dry else _CONNECTIONS)
        ]
    if "workloads" in parts:
        found.append(Task("workloads", "benchmarks.gpu.workloads", 6, ranks))
    return found


def launch(task: Task, options: argparse.Namespace) -> list[str]:
    """Return the words that start a task's Python, up to its module's arguments."""
    if task.ranks == 1:
        return [sys.executable, "-m", task.module]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(task.ranks // options.nodes)]
    if options.nodes == 1:
        return [sys.executable, *torchrun, "--standalone", "-m", task.module]
    nodes = str(options.nodes)
    on_node = 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'
    return [
        *("srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"),
        *("--kill-on-bad-exit=1", "--export=ALL", "bash", "-c", on_node, sys.executable),
        *(*torchrun[2:], "--nnodes", nodes, "--master-addr", options.address),
        *("--master-port", str(options.port), "-m", task.module),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return 1 if a part failed, 2 if it cannot run here."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    parts = options.parts.split(",") if options.parts else list(PARTS)
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
            if found is None or found.problems:
                failed.append(task.title)
            if found is not None:
                show(found, options.dry_run)
                result["parts"][task.title] = asdict(found)
            _write(options.output, result)
    print(f"written: {options.output / 'result.json'} and {options.output / 'rows.md'}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


def run(task: Task, options: argparse.Namespace, data: str, seconds: float) -> Part | None:
    """Run one task; return None if it failed."""
    if not task.module:
        return run_tests(options.dry_run, seconds)
    name = task.title.replace(" ", "-")
    json_file, log = options.output / f"{name}.json", options.output / f"{name}.log"
    json_file.unlink(missing_ok=True)
    words = [*launch(task, options), "--seconds", f"{seconds:.0f}", "--json", str(json_file)]
    words += ["--data", data] * (task.ranks > 1) + ["--dry-run"] * options.dry_run
    environment = {**os.environ, **dict(task.environment), "PYTHONPATH": _python_path()}
    # Runs end by their own budget; this limit is for those that hang.
    limit_s = seconds + 120
    with log.open("w") as output:
        status = _status_of(words, environment, output, limit_s)
    if status == 0 and json_file.exists():
        return Part(**json.loads(json_file.read_text()))
    print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
    print(f"{task.title} failed, or took over {limit_s:.0f} s; all of its output is in {log}")
    return None


def _status_of(
    words: Sequence[str], environment: dict[str, str], output: IO[str], limit_s: float
) -> int | None:
    """Return a program's status, or None if it took too long; end its whole process group."""
    process = subprocess.Popen(
        words, env=environment, cwd=_ROOT, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_tests(dry: bool, seconds: float) -> Part | None:
    """Run the tests that need a card, or without one collect them."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["--collect-only"] * dry + ["tests/gpu"]
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    try:
        done = subprocess.run(
            words, env=environment, cwd=_ROOT, text=True, capture_output=True, timeout=seconds + 120
        )
    except subprocess.TimeoutExpired:
        return Part(left_out=["tests: not done when the time was spent"])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = lines[-1].strip("= ") if lines else done.stderr[-2000:]
    problems = [f"tests: {said}"] if done.returncode else []
    if problems:
        print(done.stdout[-8000:])
    return Part({"Tests of kind gpu": [{"said": said}]}, problems=problems)


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
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}; default: all")
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
