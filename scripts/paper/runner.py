"""Command of a figure: its arguments, runs and result. The figures' own files are thin.

`--toy` trains on this machine's CPU, one run after the other. `--slurm` submits a job for each run
and waits. Both go through `scripts/slurm/pretrain.sbatch`, with one log per run. `--collect` only
reads the logs. `experiments` defines the runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_laer.files.checks import one_line, quoted, refuse_unusable_folder, shell_words
from megatron_laer.files.writing import free_name, open_exclusively
from megatron_laer.tools.cli.argument_types import between, path
from megatron_laer.tools.cli.program import Parser
from megatron_laer.tools.data import default_text_sources, prepare_data
from scripts.paper import published
from scripts.paper.experiments import (
    FIRST,
    GPUS_PER_NODE,
    MODELS,
    NODES,
    Case,
    Experiment,
    Request,
    Run,
    flags,
    log_path,
    metrics_folder,
    settings,
    weights_folder,
)
from scripts.paper.measured import Measured, Profile, read_log, read_profile
from scripts.paper.tables import Result, Table

_ROOT = Path(__file__).resolve().parents[2]
SBATCH = _ROOT / "scripts" / "slurm" / "pretrain.sbatch"
SCRIPT = _ROOT / "pretrain_gpt.py"
_MOST_STEPS = 100_000
_TOY_NOTE = "Times at toy scale say that it runs, and nothing of what is faster."
# Number of source files of Python's standard library: enough text for toy runs.
_TOY_SOURCES = 150


@dataclass(frozen=True)
class Found:
    """Input of a figure's tables.

    `runs` are the completed ones of `all_runs`. `published` is the folder of the artifact's files,
    if it has all that the figure needs.
    """

    runs: Mapping[Run, Measured]
    profiles: Mapping[Run, Profile]
    all_runs: Sequence[Run]
    skipped: int
    published: Path | None

    def seconds(self, run: Run | None) -> float | None:
        """Return a run's mean step time, or None if it is missing."""
        found = None if run is None else self.runs.get(run)
        return None if found is None else found.seconds(self.skipped)

    def balance(self, run: Run | None) -> float | None:
        """Return a run's max/mean tokens per rank, or None if it is missing or unmeasured."""
        found = None if run is None else self.runs.get(run)
        return None if found is None else found.balance(self.skipped)

    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.all_runs))


Tables = Callable[[Found], Sequence[Table]]


def main(
    experiment: Experiment,
    tables: Tables,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a figure's command; return 1 if a run failed or is missing, else 0.

    Raises ValueError or OSError for bad arguments before anything is trained. `tables` makes the
    figure's tables.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    ours, extra = split_extra(words)
    parser = _parser(experiment)
    options = parser.parse_args(ours)
    _check(options, extra)
    request = _request(experiment, options, extra)
    runs = _chosen(experiment, options)
    models = dict.fromkeys(run.model for run in runs) if experiment.starts_alike else ()
    first = [Run(model, Case(FIRST)) for model in models]
    absent = published.missing(options.published, experiment.published)
    known = None if absent else options.published
    if known is not None:
        # Report damage before hours of training; making the tables reads all of it.
        tables(Found({}, {}, runs, request.length.skipped, known))
    if options.dry_run:
        for run in (*first, *runs):
            print(command_line(experiment, run, request))
        return 0
    if not options.collect:
        request.folder.mkdir(parents=True, exist_ok=True)
        with open_exclusively(request.folder / ".running"):
            _move_aside([*first, *runs], request)
            if request.toy:
                _make_data(request)
            for at_once in filter(None, (first, runs)):
                _train(experiment, at_once, request)
    return _report(experiment, tables, runs, request, absent, known)


def split_extra(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"scripts/paper/figure{experiment.figure}.py",
        description=f"The paper's figure {experiment.figure}: {experiment.title}.",
        epilog="What follows -- is given to Megatron, and wins over what is set here.",
    )
    scale = parser.add_mutually_exclusive_group(required=True)
    scale.add_argument(
        "--toy", action="store_true", help="four CPU ranks, small models, few steps: that it runs"
    )
    scale.add_argument("--slurm", action="store_true", help="the paper's sizes, a job for each run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="print the commands of all runs")
    action.add_argument("--collect", action="store_true", help="read the logs that are there")
    add_result_options(parser)
    parser.add_argument(
        "--models", nargs="+", choices=experiment.models, metavar="MODEL", help="of the paper"
    )
    methods = experiment.methods()
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[method.name for method in methods],
        metavar="METHOD",
        help="; ".join(f"{method.name}: {method.about}" for method in methods),
    )
    parser.add_argument(
        "--steps",
        type=between(2, _MOST_STEPS),
        help=f"default {experiment.length.steps}, with --toy {experiment.toy_length.steps}",
    )
    cluster = parser.add_argument_group("with --slurm")
    cluster.add_argument("--data-prefix", help="a dataset made by prepare-data")
    cluster.add_argument("--tokenizer", help="a Hugging Face tokenizer's folder, or bytes")
    cluster.add_argument(
        "--nodes", type=int, choices=(1, 2, 4), help=f"of {GPUS_PER_NODE} GPUs; default {NODES}"
    )
    cluster.add_argument("--time", help=f"of a job; default {experiment.length.time_limit}")
    cluster.add_argument("--sbatch", help='more of sbatch, such as --sbatch="--partition gpu"')
    return parser


def add_result_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=path, help="the folder with laer_ae_*.csv")
    parser.add_argument("--work-dir", default=".paper", help="for logs; default %(default)s")


def check_result_options(options: argparse.Namespace) -> None:
    refuse_unusable_folder(options.work_dir, "--work-dir")
    if options.published is not None and not options.published.is_dir():
        raise ValueError(f"--published {quoted(options.published)} is no folder; give one that is")


def split_words(text: str | None, flag: str) -> list[str]:
    """Split a flag's value into words as a shell does; raise ValueError for an open quotation."""
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"{flag} {quoted(text)}: {error}; give words as to a shell") from error


_OF_CLUSTER = ("data_prefix", "tokenizer", "nodes", "time", "sbatch")


def _check(options: argparse.Namespace, extra: Sequence[str]) -> None:
    check_result_options(options)
    if any(word.partition("=")[0] == "--train-iters" for word in extra):
        raise ValueError("--train-iters would hide how long runs are; give --steps")
    if options.toy:
        given = [name for name in _OF_CLUSTER if getattr(options, name) is not None]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise ValueError(f"{flag} is for --slurm; --toy makes its own data and needs no Slurm")
    elif not options.collect and not (options.data_prefix and options.tokenizer):
        raise ValueError("--slurm needs --data-prefix and --tokenizer of the data to train on")
    elif not options.collect and not options.dry_run and shutil.which("sbatch") is None:
        raise ValueError(
            "--slurm needs sbatch, which is not here; --dry-run prints what it is told"
        )


def _request(experiment: Experiment, options: argparse.Namespace, extra: Sequence[str]) -> Request:
    scale = "toy" if options.toy else "slurm"
    length = experiment.toy_length if options.toy else experiment.length
    if options.steps is not None:
        # Skip the same share of steps.
        skipped = max(1, length.skipped * options.steps // length.steps)
        length = replace(length, steps=options.steps, skipped=skipped)
    folder = Path(options.work_dir).resolve() / f"figure{experiment.figure}-{scale}"
    return Request(
        toy=options.toy,
        folder=folder,
        data_prefix=str(folder / "text") if options.toy else options.data_prefix or "",
        tokenizer="bytes" if options.toy else options.tokenizer or "",
        length=replace(length, time_limit=options.time or length.time_limit),
        nodes=options.nodes or NODES,
        sbatch=split_words(options.sbatch, "--sbatch"),
        flags=extra,
    )


def _chosen(experiment: Experiment, options: argparse.Namespace) -> list[Run]:
    default = experiment.toy_models if options.toy else experiment.models
    models = [model for model in MODELS if model in (options.models or default)]
    return [
        Run(model, case)
        for model in models
        for case in experiment.cases_at(toy=options.toy)
        if options.methods is None or case.method.name in options.methods
    ]


# Environment variables of single runs; and of jobs, from within which a toy run may be started.
_OF_RUNS = ("CHECKPOINT", "DRY_RUN", "GPUS_PER_NODE")
_OF_JOBS = ("CONTAINER_", "LOG_DIR", "MASTER_ADDR", "SLURM_")


def command_line(experiment: Experiment, run: Run, request: Request) -> str:
    """Return the run's command for a shell, valid in any folder."""
    variables = [f"{name}={shell_words([value])}" for name, value in settings(run, request).items()]
    return " ".join([*variables, shell_words(_words(experiment, run, request))])


def _words(experiment: Experiment, run: Run, request: Request) -> list[str]:
    start = ["bash"] if request.toy else _sbatch(experiment, run, request)
    return [*start, str(SBATCH), str(SCRIPT), *flags(experiment, run, request)]


def _sbatch(experiment: Experiment, run: Run, request: Request) -> list[str]:
    return [
        *("sbatch", "--wait", "--nodes", str(request.nodes)),
        *("--gpus-per-node", str(GPUS_PER_NODE), "--time", request.length.time_limit),
        *("--job-name", f"figure{experiment.figure}-{run.name}"),
        *("--output", str(log_path(run, request)), *request.sbatch),
    ]


def _move_aside(runs: Sequence[Run], request: Request) -> None:
    """Rename results of earlier commands for these runs, since they may have taken days."""
    for run in runs:
        made = metrics_folder if run.case.method is not FIRST else weights_folder
        for there in (log_path(run, request), made(run, request)):
            if os.path.lexists(there):
                kept = there.rename(free_name(there))
                print(f"{there.name} of an earlier command is now {kept.name}")


def _make_data(request: Request) -> None:
    print("Making a dataset from the sources of Python's standard library ...", flush=True)
    prepare_data(default_text_sources()[:_TOY_SOURCES], request.data_prefix, progress=False)


def _train(experiment: Experiment, runs: Sequence[Run], request: Request) -> None:
    """Train all runs. A failure shows in its log, which then lacks steps."""
    if request.toy:
        for run in runs:
            print(f"{run.name}: {request.length.steps} steps", flush=True)
            with log_path(run, request).open("x", encoding="utf-8") as log:
                environment = _environment(run, request)
                environment["MASTER_PORT"] = str(_free_port())
                subprocess.run(
                    _words(experiment, run, request),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    check=False,
                )
        return
    print(f"{len(runs)} jobs are submitted; if this command is ended, --collect goes on.")
    jobs = [
        subprocess.Popen(_words(experiment, run, request), env=_environment(run, request))
        for run in runs
    ]
    for job in jobs:
        job.wait()


def _environment(run: Run, request: Request) -> dict[str, str]:
    """Return a run's environment: the user's variables for pretrain.sbatch, except these."""
    dropped = _OF_RUNS + (_OF_JOBS if request.toy else ())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    if request.toy:
        kept |= {"PYTHON": sys.executable}
    return kept | settings(run, request)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _report(
    experiment: Experiment,
    tables: Tables,
    runs: Sequence[Run],
    request: Request,
    absent: Sequence[str],
    known: Path | None,
) -> int:
    """Read the runs' results and write the figure's.

    `absent` are sentences on missing files of the artifact; `known` has all of them.
    """
    skipped = request.length.skipped
    found: dict[Run, Measured] = {}
    profiles: dict[Run, Profile] = {}
    failures = []
    for run in runs:
        try:
            found[run] = read_log(log_path(run, request), request.length.steps)
            if experiment.records_metrics and run.case.method.uses_fsep:
                profiles[run] = read_profile(metrics_folder(run, request), skipped)
        except (ValueError, OSError) as error:
            failures.append(str(error))
    result = Result(experiment.figure, experiment.title, "toy" if request.toy else "slurm")
    result.tables += tables(Found(found, profiles, runs, skipped, known))
    result.notes += [*failures, *absent, *experiment.notes]
    if request.toy:
        result.notes.append(_TOY_NOTE)
    return finish(result, request.folder, failed=bool(failures))


def finish(result: Result, folder: Path, *, failed: bool = False) -> int:
    written = result.write(folder)
    print(f"\n{result.text()}\n\n{one_line(f'Also in {written} and, as text, next to it.')}")
    return int(failed)
