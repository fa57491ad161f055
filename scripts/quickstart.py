"""Quick start: trains a small MoE GPT on this machine's CPU with FSEP and with stock, in turn.

`quickstart.sh` makes the environment and calls this. It starts `pretrain_gpt.py` under torchrun,
twice with each, follows its log and compares; it trains nothing itself. The gain is that of
`report`, from the last pair of runs. Other programs may take time from a training, so no gain is
claimed where two of a kind differ, or where steps take far longer than their processor time.

Over 400 lines: one program, in the order of its output.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_laer.device import CPU_FLAGS
from megatron_laer.files.checks import one_line, quoted, refuse_unusable_folder
from megatron_laer.files.writing import write_file
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry import log as training_log
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE
from megatron_laer.tools.cli.argument_types import between
from megatron_laer.tools.cli.program import Parser, ended
from megatron_laer.tools.model_flags import model_flags
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.logs import read_logs
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.run_files import find_run
from megatron_laer.tools.simulator.output import filled

_SCRIPT = Path(__file__).resolve().parents[1] / "pretrain_gpt.py"

MODEL = "tiny-wide"
STEPS = 20
# Neighbours in time are of both kinds.
_ORDER = ("FSEP", "stock", "stock", "FSEP")
# Some hours; longer runs belong on larger machines.
MAX_STEPS = 100_000
_SECONDS_BETWEEN_LINES = 5.0
_CACHE, _LOG = "cache", "{}.log"
# The name of stock's log where a gain from it would be wrong; `report` does not read it.
_DISTURBED = "stock.log.disturbed"
# A machine is too busy from this wall time over processor time on, or if equal runs differ so much.
_MOST_OVER_CPU, _MOST_APART = 1.3, 1.1

_SEQUENCES = 16
TRAINING_FLAGS = f"""
    --micro-batch-size {_SEQUENCES} --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
    --lr-warmup-fraction 0.05 --weight-decay 0.1 --clip-grad 1.0 --seed 1234 --split 95,5,0
    --eval-iters 0 --eval-interval 1000000 --log-interval 1 --num-workers 0
""".split()


@dataclass
class Run:
    """Measurements of one training, from its log.

    `cpu_ms` has the busiest rank's processor time of each step but the first: no other program
    changes it, and it leaves out waits.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    load_imbalance: list[float] = field(default_factory=list)
    layouts: int = 1
    wall_s: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print the comparison; return 1 if a part fails.

    Raises ValueError or OSError for bad arguments.
    """
    args = _parser().parse_args(argv)
    started_s = time.monotonic()
    refuse_unusable_folder(args.work_dir, "--work-dir")
    args.work_dir = Path(args.work_dir)
    _refuse_others(args.work_dir)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        text = _prepare_text(args.work_dir)
        shared = [*model_flags(MODEL), "--data-path", str(text), *_run_flags(args)]
        runs = [_train(name, shared, args) for name in _ORDER]
        headline = _headline(runs, args.work_dir)
        page = _write_page(args.work_dir)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{filled(f'{headline} {_losses(runs)}')}\n\n{_comparison(runs, args.ranks)}\n\n{page}")
    result = {"ranks": args.ranks, "steps": args.steps, "runs": [asdict(run) for run in runs]}
    path = args.work_dir / "result.json"
    write_file(path, json.dumps(result, indent=1) + "\n")
    print(
        f"\n{time.monotonic() - started_s:.0f} s. Every step is in {one_line(path)}, full logs are "
        "in the same folder."
    )
    return 0


def _recordings(work_dir: Path) -> tuple[Path, ...]:
    return METRICS.path(work_dir, 0), TRACE.path(work_dir, 0), LAYOUTS.path(str(work_dir), 0)


def _refuse_others(work_dir: Path) -> None:
    """Raise ValueError for a folder with recordings of another run, which would be removed."""
    there = [path for path in _recordings(work_dir) if path.exists()]
    if there and not (work_dir / _LOG.format("fsep")).exists():
        raise ValueError(
            f"{quoted(there[0])} is of another run than a quick start; give another --work-dir"
        )


def _fsep_flags(work_dir: Path) -> list[str]:
    """Remove an earlier run's recordings; return FSEP's flags, which record the page's data."""
    for path in _recordings(work_dir):
        path.unlink(missing_ok=True)
    recordings = ["--fsep-record", str(work_dir), "metrics", "trace", "layouts"]
    return ["--expert-parallel-mode", "fsep", *recordings]


def _write_page(work_dir: Path) -> str:
    """Write the page on the run with FSEP; return its place, or the packages to install."""
    page = work_dir / "report.html"
    result = _command("report", str(work_dir), "--out", str(page))
    if "megatron_laer[tools]" in result.stderr:
        return f"No page: {result.stderr.strip()}"
    if result.returncode:
        raise RuntimeError(f"Writing {page} failed:\n{result.stderr}")
    return f"A page on the run with FSEP, for a browser: {one_line(page)}"


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_laer", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | _ENVIRONMENT)


def _parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0))
    parser = Parser(
        prog="scripts/quickstart.sh",
        description="Trains a small MoE GPT on this machine's CPU with FSEP and with stock expert "
        "parallelism, twice each in turn, and compares them.",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        choices=(2, 4),
        default=4 if cores >= 4 else 2,
        help="CPU ranks (default %(default)s on this machine)",
    )
    parser.add_argument(
        "--steps", type=between(1, MAX_STEPS), default=STEPS, help="default %(default)s"
    )
    parser.add_argument("--work-dir", default=".quickstart", help="default %(default)s")
    return parser


def _prepare_text(work_dir: Path) -> Path:
    print("Making a dataset from the sources of Python's standard library ...", flush=True)
    prefix = work_dir / "text"
    result = _command("prepare-data", "--python-sources", "--output", str(prefix))
    if result.returncode:
        raise RuntimeError(f"Making the dataset failed:\n{result.stderr}")
    # The cache may be of an earlier quick start, with another Python's sources.
    shutil.rmtree(work_dir / _CACHE, ignore_errors=True)
    print(f"  {result.stdout.splitlines()[0]}")
    return prefix


def _run_flags(args: argparse.Namespace) -> list[str]:
    cache = args.work_dir / _CACHE
    return [
        *CPU_FLAGS,
        *TRAINING_FLAGS,
        *f"--train-iters {args.steps} --data-cache-path {cache}".split(),
        *f"--global-batch-size {_SEQUENCES * args.ranks}".split(),
        *f"--expert-model-parallel-size {args.ranks} --expert-tensor-parallel-size 1".split(),
    ]


def _train(name: str, flags: list[str], args: argparse.Namespace) -> Run:
    print(f"\nTraining with {name} on {args.ranks} CPU ranks, {args.steps} steps", flush=True)
    routing = args.work_dir / "stock-routing"
    if name == "stock":
        # Stock has no metric of balance, so its routing is recorded and counted afterwards.
        flags = [*flags, "--moe-routing-trace-path", str(routing)]
    else:
        flags = [*flags, *_fsep_flags(args.work_dir)]
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc-per-node", str(args.ranks)),
        *(str(_SCRIPT), *flags),
    ]
    run = Run(name)
    log_path = args.work_dir / _LOG.format(name.lower())
    started_s = time.monotonic()
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | _ENVIRONMENT,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            _follow(_copied(process.stdout, log), run, args.steps, process.pid)
        except BaseException:
            # torchrun then terminates its ranks.
            process.terminate()
            raise
    run.wall_s = time.monotonic() - started_s
    if process.returncode or len(run.losses) != args.steps:
        tail = "\n".join(log_path.read_text(encoding="utf-8").splitlines()[-30:])
        raise RuntimeError(
            f"{tail}\n\nTraining with {name} ended with status {process.returncode} after "
            f"{len(run.losses)} of {args.steps} steps; its whole log is {log_path}"
        )
    if name == "stock":
        run.load_imbalance = _traced_imbalance(routing, args.ranks)
    return run


_ENVIRONMENT = {
    # Also with a GPU, so that the quick start is the same everywhere.
    "MEGATRON_LAER_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}


def _copied(lines: Iterator[str], log: object) -> Iterator[str]:
    for line in lines:
        print(line, end="", file=log)  # type: ignore[call-overload]
        yield line


def _follow(lines: Iterator[str], run: Run, steps: int, launcher: int) -> None:
    """Read a run's numbers from its log, and print progress from time to time."""
    printed_s = -float("inf")
    before: dict[str, float] = {}
    for line in lines:
        step = training_log.step_of_line(line)
        if step is None:
            continue
        values = step.values
        run.losses.append(values[training_log.LOSS])
        run.step_ms.append(values[training_log.STEP_MS])
        now = _cpu_ms(launcher)
        if before:
            run.cpu_ms.append(max(now[rank] - before.get(rank, 0.0) for rank in now))
        before = now
        if training_log.IMBALANCE in values:
            run.load_imbalance.append(values[training_log.IMBALANCE])
            # The first layout has version 0.
            run.layouts = int(values["fsep_layout_version"]) + 1
        done = len(run.losses)
        if done == steps or time.monotonic() - printed_s > _SECONDS_BETWEEN_LINES:
            printed_s = time.monotonic()
            left_s = (steps - done) * statistics.median(run.step_ms) / 1e3
            balance = f", max/mean {run.load_imbalance[-1]:.2f}" if run.load_imbalance else ""
            print(
                f"  step {done:4d} of {steps}, loss {run.losses[-1]:.3f}{balance}, "
                f"about {left_s:.0f} s left",
                flush=True,
            )


def _cpu_ms(launcher: int) -> dict[str, float]:
    """Return the processor time of each of the launcher's ranks so far, by Linux's count."""
    ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    fields = {rank: Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2] for rank in ranks}
    ticks = {rank: sum(map(int, text.split()[11:13])) for rank, text in fields.items()}
    return {rank: 1e3 * count / os.sysconf("SC_CLK_TCK") for rank, count in ticks.items()}


def _traced_imbalance(folder: Path, num_ranks: int) -> list[float]:
    """Return each step's measured max/mean tokens per rank, over layers and microbatches."""
    by_step: dict[int, list[float]] = {}
    paths = [folder / f"router_trace_rank{rank}.jsonl" for rank in range(num_ranks)]
    # Ranks run the same layers in the same order, so equal lines are the same microbatch.
    for records in zip(*map(_trace_records, paths), strict=True):
        assert len({(step, layer) for step, layer, _ in records}) == 1
        counts_NE = np.stack([counts_E for _, _, counts_E in records])
        by_step.setdefault(records[0][0], []).append(max_over_mean(stock_tokens_N(counts_NE)))
    for path in paths:
        path.unlink()
    return [float(np.mean(by_step[step])) for step in sorted(by_step)]


def _trace_records(path: Path) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    experts = int(_flag_value(model_flags(MODEL), "--num-experts"))
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            chosen_TK = np.asarray(record["top_indices"], dtype=np.int64)
            counts_E = np.bincount(chosen_TK.ravel(), minlength=experts)
            yield record["step"], record["layer"], counts_E


def _flag_value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def _comparison(runs: Sequence[Run], ranks: int) -> str:
    """Return the table of all runs, in the order of training."""
    steps = len(runs[0].losses)
    window = _window(runs[0])
    n = len(window)

    def row(label: str, of_run: Callable[[Run], float], form: str) -> tuple[str, list[str]]:
        return label, [format(of_run(run), form) for run in runs]

    rows = [
        row("loss at iteration 1", lambda run: run.losses[0], ".6f"),
        row(f"loss at iteration {steps}", lambda run: run.losses[-1], ".6f"),
        row("expert layouts used", lambda run: run.layouts, "d"),
        row(
            "max/mean tokens per rank", lambda run: statistics.fmean(run.load_imbalance[-n:]), ".3f"
        ),
        row("step time, median (ms)", _step_ms, ".0f"),
        row("processor time of the busiest rank (ms)", _cpu_ms_of, ".0f"),
    ]
    return (
        f"{training_log.table([run.name for run in runs], rows)}\n"
        f"Balance: 1.000 is perfect, {ranks}.000 the worst; over every layer and microbatch.\n"
        f"Balance and times are of the {training_log.in_words(window)}."
    )


def _window(run: Run) -> range:
    return training_log.window(range(1, len(run.losses) + 1))


def _step_ms(run: Run) -> float:
    return statistics.median(run.step_ms[-len(_window(run)) :])


def _cpu_ms_of(run: Run) -> float:
    return statistics.median(run.cpu_ms[-len(_window(run)) :] or [0.0])


def _headline(runs: Sequence[Run], work_dir: Path) -> str:
    """Return the verdict of `report`, or say why the machine was too busy for one."""
    log = work_dir / _LOG.format("stock")
    if (why := why_too_busy(runs)) is not None:
        log.replace(work_dir / _DISTURBED)
        return (
            f"No speedup is claimed, since this machine is too busy for one: {why}. Try again when "
            "fewer other programs run."
        )
    (work_dir / _DISTURBED).unlink(missing_ok=True)
    files = find_run(work_dir, None)
    recording = read_metrics(files.metrics)
    return f"{assess(recording, read_logs(files, recording)).sentence()}."


def why_too_busy(runs: Sequence[Run]) -> str | None:
    """Return why speeds cannot be compared, or None if they can.

    With a processor for each rank, a step takes about the processor time of its busiest rank.
    """
    for name in dict.fromkeys(run.name for run in runs):
        times = [_step_ms(run) for run in runs if run.name == name]
        if max(times) > _MOST_APART * min(times):
            low, high = min(times), max(times)
            return (
                f"equal trainings with {name} took {low:.0f} and {high:.0f} ms per step, more than "
                "a tenth apart"
            )
    for run in runs:
        over = _step_ms(run) / _cpu_ms_of(run) if _cpu_ms_of(run) > 0 else 1.0
        if over > _MOST_OVER_CPU:
            return (
                f"a step with {run.name} took {_step_ms(run):.0f} ms, {over:.1f} times the "
                f"{_cpu_ms_of(run):.0f} ms of processor time of its busiest rank"
            )
    return None


def _losses(runs: Sequence[Run]) -> str:
    first = runs[0].losses
    furthest = max(
        abs(one - other) for run in runs for one, other in zip(first, run.losses, strict=True)
    )
    if furthest == 0:
        return "Their losses are the same to the last digit."
    return f"Their losses differ by at most {furthest:.1e}."


if __name__ == "__main__":
    sys.exit(ended("scripts/quickstart.sh", main))
