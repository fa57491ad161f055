"""The paper's experiments: their commands, what is read of runs and files, and their tables."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.published_cells import read_ablation
from megatron_laer.config import FSEPConfig
from megatron_laer.platform.cpu import CPU_FLAGS
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import MetricsWriter, Shape, recording_path
from scripts.paper import figure8, figure9, figure10, figure11, figure12, published, runner
from scripts.paper.experiments import FSEP, LAER, MODELS, STATIC, STOCK, Case, Run
from scripts.paper.measured import Measured, read_log, read_profile
from scripts.paper.runner import Found
from scripts.paper.tables import Result, Table
from tests import processes
from tests.unit.shell_scripts import fake_python, shell

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(
    not (PUBLISHED / published.END_TO_END).exists(), reason="the artifact's files are absent"
)
E8K2 = "mixtral-8x7b-e8k2"
DATA = ["--data-prefix", "/data/text", "--tokenizer", "/data/tokenizer"]


def run_figure(figure: Any, *words: object) -> int:
    """The status of a figure's command, also where argparse ends it."""
    try:
        if figure is figure11:
            return figure11.main([*map(str, words)])
        files = [published.ABLATION] if figure is figure12 else [published.END_TO_END]
        return runner.main(figure.EXPERIMENT, figure.tables, files, [*map(str, words)])
    except SystemExit as stopped:
        return int(str(stopped.code))


def log_line(step: int, of: int, time_ms: float, loss: float, more: str = "") -> str:
    """As Megatron writes it."""
    return (
        f" [2026-01-01 00:00:00] iteration {step:8d}/{of:8d} | consumed samples: {step} | "
        f"elapsed time per iteration (ms): {time_ms} | lm loss: {loss:.6E} | {more}"
    )


# What is read.


def test_a_whole_log_is_read_and_the_first_steps_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    imbalance = "fsep_load_imbalance: 1.500 | fsep_stock_load_imbalance: 1.700 |"
    times_ms = {1: 9000.0, 2: 100.0, 3: 300.0}
    lines = [log_line(step, 3, ms, 5 - step, imbalance) for step, ms in times_ms.items()]
    path.write_text("\n".join(["something else", *lines]))
    found = read_log(path, 3)
    assert found.step_s == [9.0, 0.1, 0.3] and found.losses == [4.0, 3.0, 2.0]
    assert found.seconds(1) == pytest.approx(0.2)
    assert found.balance(1) == 1.5 and found.stock_imbalance == [1.7] * 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "0 of 3 steps"),
        ([log_line(step, 3, 1.0, 1.0) for step in (1, 2)], "2 of 3 steps"),
        ([log_line(step, 4, 1.0, 1.0) for step in (1, 2, 3, 4)], "4 of 3 steps"),
        ([log_line(step, 3, 1.0, 1.0).replace("lm", "no") for step in (1, 2, 3)], "without a loss"),
    ],
)
def test_a_log_that_is_not_whole_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "a.log"
    with pytest.raises(ValueError, match="a: no log at"):
        read_log(path, 3)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"a: .*{said}"):
        read_log(path, 3)


def test_a_profile_is_the_mean_of_later_steps(tmp_path: Path) -> None:
    shape = Shape(num_ranks=2, num_experts=8, capacity=5, node_size=2, layers=("layer 1",))
    writer = MetricsWriter(recording_path(tmp_path, 0), shape, {}, 0)
    for step, scale in enumerate((100.0, 1.0, 3.0)):
        of_step = {metric.name: scale for metric in RECORDED_OF_STEPS} | {"step": step}
        of_layers = {metric.name: [scale] for metric in RECORDED_OF_LAYERS}
        of_layers |= {"passes": [1], "stock_max_over_mean": [math.nan if step == 1 else 1.5]}
        writer.append(of_step, {}, of_layers, np.array([[8, 8]]))
    writer.close()
    found = read_profile(tmp_path, 1)
    assert found.kinds == pytest.approx((4e-3, 2e-3, 2e-3))  # dispatch and combine; experts; step
    assert found.exposed_s == pytest.approx(4e-3)
    assert (found.max_over_mean, found.stock_max_over_mean) == (2.0, 1.5)
    with pytest.raises(ValueError, match="no step after the first 3"):
        read_profile(tmp_path, 3)


def test_curves_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    rows = ["iter,method,aux_loss,loss,time", "2,LAER,0.0001,4.5,1500", "1,LAER,0.0001,5.5,2500"]
    (tmp_path / published.CONVERGENCE).write_text("\n".join(rows))
    curve = published.read_curves(tmp_path)["LAER", 1e-4]
    assert (curve.losses, curve.step_s) == ([5.5, 4.5], [2.5, 1.5])


def test_absent_files_are_named(tmp_path: Path) -> None:
    assert "give --published FOLDER" in published.missing(None, ["a.csv"])[0]
    (tmp_path / "a.csv").write_text("")
    (said,) = published.missing(tmp_path, ["a.csv", "b.csv"])
    assert "has no b.csv" in said


@needs_files
def test_published_balance_is_that_of_the_figure() -> None:
    found = {key: round(value, 2) for key, value in published.read_balance(PUBLISHED).items()}
    assert found["e8k2", "LAER"] == 1.39 and found["e16k4", "LAER"] == 1.17
    assert found["e8k2", "FSDP"] == 1.66 and found["e16k4", "FSDP"] == 1.88


# Tables.


def measured(step_s: float, steps: int = 3) -> Measured:
    return Measured([1.0] * steps, [step_s] * steps, [1.2] * steps, [1.5] * steps)


@needs_files
def test_figure_8_has_the_papers_speed_beside_ours() -> None:
    runs = [Run(E8K2, case) for case in figure8.EXPERIMENT.cases]
    ended = {Run(E8K2, Case(STOCK)): measured(3.0), Run(E8K2, Case(LAER)): measured(2.0)}
    (table,) = figure8.tables(Found(ended, {}, runs, 1, PUBLISHED))
    rows = {(row["aux"], row["ours"]): row for row in table.rows}
    assert len(table.rows) == 10
    laer = rows["0", "laer"]
    assert laer["speed"] == 1.5 and laer["max/mean"] == 1.2
    # 43.38 s over 26.33 s.
    assert laer["paper s"] == pytest.approx(26.33, abs=0.01)
    assert laer["paper speed"] == pytest.approx(1.65, abs=0.01)
    assert rows["0", "fsep"]["s"] is None and rows["1e-4", "laer"]["speed"] is None
    flex = rows["0", None]
    assert flex["paper"] == "FLEX" and flex["s"] is None and flex["paper s"] > 20


def test_figure_9_answers_at_which_speed_the_low_loss_is_had() -> None:
    def curve(step_s: float, slope: float) -> published.Curve:
        return published.Curve([10 - slope * step for step in range(100)], [step_s] * 100)

    cases = dict.fromkeys(figure9.EXPERIMENT.cases)
    high, low, fsep = cases
    found = figure9.answer({high: curve(1.2, 0.05), low: curve(2.0, 0.1), fsep: curve(1.0, 0.1)})
    speed_high, speed_low, less_high, less_low, sooner = found.values()
    assert speed_high == pytest.approx(1.2) and speed_low == pytest.approx(2.0)
    # Means of the last ten of each.
    assert less_high == pytest.approx(0.05 * 94.5) and less_low == pytest.approx(0.0)
    # 10 - 0.05 * 94.5 is FSEP's mean over ten steps that end with number 51.75: the 53rd.
    assert sooner == pytest.approx(120 / 53)
    assert set(figure9.answer({fsep: curve(1.0, 0.1)}).values()) == {None}


def test_figure_9_says_nothing_of_a_loss_that_is_not_reached() -> None:
    high, _, fsep = figure9.EXPERIMENT.cases
    worse = published.Curve([9.0] * 20, [1.0] * 20)
    better = published.Curve([8.0] * 20, [1.0] * 20)
    *_, sooner = figure9.answer({high: better, fsep: worse}).values()
    assert sooner is None


@needs_files
def test_figure_12_leaves_out_what_has_no_counterpart() -> None:
    runs = [Run(E8K2, case) for case in figure12.EXPERIMENT.cases]
    ended = {Run(E8K2, Case(STATIC)): measured(4.0), Run(E8K2, Case(FSEP)): measured(2.0)}
    (table,) = figure12.tables(Found(ended, {}, runs, 1, PUBLISHED))
    ours = {row["ours"]: row for row in table.rows if row["ours"]}
    assert ours["fsep"]["speed"] == 2.0 and ours["fsep"]["paper s"] is None
    assert ours["laer"]["paper speed"] == pytest.approx(1.355, abs=1e-3)
    assert {row["paper"] for row in table.rows} - {None} == {*read_ablation(PUBLISHED)}
    assert {row["paper"] for row in table.rows if row["ours"] is None} == {"no_even", "no_pq"}


def test_a_result_is_written_as_text_and_as_json(tmp_path: Path) -> None:
    rows = [{"model": "a", "s": 1.5}, {"model": "b", "s": None}]
    result = Result(8, "End to end", "toy", [Table("Seconds", rows)], ["One is missing."])
    path = result.write(tmp_path)
    text = (tmp_path / "result.txt").read_text()
    assert "Figure 8. End to end (toy)" in text and "* One is missing." in text
    assert [line.split() for line in text.splitlines()[3:6]] == [
        ["model", "s"],
        ["a", "1.5000"],
        ["b", "-"],
    ]
    written = json.loads(path.read_text())
    assert written["tables"][0]["rows"] == rows and written["machine"]["cores"]


# Commands.


def dry_run(figure: Any, capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert run_figure(figure, "--slurm", "--dry-run", *DATA, *words) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_a_job_is_submitted_for_each_run_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(figure8, capsys, "--sbatch", "--partition gpu")
    assert len(lines) == len(MODELS) * 2 * 4
    outputs = {line[line.index("--output") + 1] for line in lines}
    assert len(outputs) == len(lines)
    assert all(line[line.index("--partition") + 1] == "gpu" for line in lines)
    laer = next(line for line in lines if "laer" in line)
    assert {"MODEL=mixtral-8x7b-e8k2", "MODE=fsep", "CAPACITY=2"} <= set(laer)
    # 32 ranks, each with two microbatches of two sequences.
    for flag, value in (("--nodes", "4"), ("--micro-batch-size", "2"), ("--train-iters", "70")):
        assert laer[laer.index(flag) + 1] == value
    stock = lines[0]
    assert {"MODE=standard", "EP_SIZE=8"} <= set(stock)
    assert stock[stock.index("--tensor-model-parallel-size") + 1] == "8"


_VALIDATE = """
import json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments

stdout, sys.stdout = sys.stdout, sys.stderr
seen = []
for words in json.load(sys.stdin):
    sys.argv[1:] = words
    args = arguments.parse_args()
    arguments.validate_args(args)
    seen.append([
        args.expert_parallel_mode,
        args.expert_model_parallel_size,
        args.tensor_model_parallel_size,
        args.micro_batch_size * args.seq_length,
        args.global_batch_size // args.micro_batch_size // args.data_parallel_size,
    ])
print(json.dumps(seen), file=stdout)
"""


def started(command: list[str]) -> list[str]:
    """Megatron's command line, as pretrain.sbatch makes it, on one node of 32 ranks."""
    variables = dict(word.split("=", 1) for word in command[: command.index("sbatch")])
    result = shell(
        runner.SBATCH,
        *command[command.index("--") :],
        DRY_RUN="1",
        GPUS_PER_NODE="32",
        PYTHON=sys.executable,
        **variables,
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    return words[words.index(str(runner.SBATCH.parents[2] / "pretrain_gpt.py")) + 1 :]


@pytest.mark.distributed
def test_megatron_takes_what_jobs_start_on_32_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """As far as its validation. All else of a job is as in tests of pretrain.sbatch."""
    e16k4 = ["--models", "mixtral-8x22b-e16k4"]
    stock, _, laer, *_ = dry_run(figure8, capsys, *e16k4)
    high, _, fsep = dry_run(figure9, capsys)
    recorded = dry_run(figure10, capsys, *e16k4[:1], "mixtral-8x7b-e16k4", "--methods", "static")
    commands = [stock, laer, high, fsep, *recorded]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "32000"]
    lines = [[*started(command), *CPU_FLAGS, *tokenizer] for command in commands]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _VALIDATE],
        input=json.dumps(lines),
        env=os.environ
        | {"PYTHONPATH": processes.python_path(), "MEGATRON_LAER_DEVICE": "cpu"}
        | {"RANK": "0", "WORLD_SIZE": "32", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # Expert and tensor parallelism, tokens of a rank's microbatch, microbatches: the paper's.
    assert json.loads(result.stdout.splitlines()[-1]) == [
        ["standard", 8, 4, 8192, 16],
        ["fsep", 32, 1, 16384, 2],
        ["standard", 8, 4, 4096, 16],
        ["fsep", 32, 1, 16384, 1],
        ["fsep", 32, 1, 16384, 2],
    ]


@pytest.mark.parametrize("case", figure12.EXPERIMENT.cases, ids=lambda case: case.method.name)
def test_every_ablation_is_a_setting_of_its_own(case: Case) -> None:
    words = case.method.flags.split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    names = {flag.removeprefix("--fsep-").replace("-", "_"): to for flag, to in given.items()}
    FSEPConfig(**names)
    others = [other.method.flags for other in figure12.EXPERIMENT.cases if other != case]
    assert case.method.flags not in others


_FAKE_SBATCH = """
while [ $# -gt 0 ]; do
    case $1 in
        --output) log=$2 ;;
        --train-iters) steps=$2 ;;
    esac
    shift
done
[ "$MODE" = fsep ] && time=100 || time=150
[ "$MODEL" != qwen-8x7b-e8k2 ] || exit 1
for step in $(seq "$steps"); do
    echo " iteration $step/ $steps | elapsed time per iteration (ms): $time.0 | lm loss: 5.0E+00 |"
done >"$log"
"""


def test_jobs_are_waited_for_and_their_logs_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, "sbatch", _FAKE_SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["--slurm", "--work-dir", tmp_path, "--steps", "5", "--methods", "stock", "fsep"]
    words += ["--models", E8K2]
    assert run_figure(figure8, *words, *DATA) == 0
    folder = tmp_path / "figure8-slurm"
    first = json.loads((folder / "result.json").read_text())
    speed = {row["ours"]: row["speed"] for row in first["tables"][0]["rows"]}
    assert speed == {"stock": 1.0, "fsep": pytest.approx(1.5), None: None}
    # Logs alone, without Slurm.
    monkeypatch.setenv("PATH", os.environ["PATH"].removeprefix(f"{tmp_path}:"))
    assert run_figure(figure8, *words, "--collect") == 0
    assert json.loads((folder / "result.json").read_text()) == first
    assert run_figure(figure8, *words, "qwen-8x7b-e8k2", "--collect") == 1
    assert "qwen-8x7b-e8k2_aux0_stock: no log at" in (folder / "result.txt").read_text()


def test_a_failed_job_fails_the_command_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, "sbatch", _FAKE_SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    models = ["--models", E8K2, "qwen-8x7b-e8k2"]
    words = ["--slurm", "--work-dir", tmp_path, "--steps", "5", "--methods", "fsep", *models]
    # An earlier result is none of this run.
    log = tmp_path / "figure8-slurm" / "qwen-8x7b-e8k2_aux0_fsep.log"
    log.parent.mkdir()
    log.write_text("\n".join(log_line(step, 5, 1.0, 1.0) for step in range(1, 6)))
    assert run_figure(figure8, *words, *DATA) == 1
    rows = json.loads((log.parent / "result.json").read_text())["tables"][0]["rows"]
    assert [row["s"] for row in rows if row["ours"]] == [0.1, 0.1, None, None]


def test_figure_11_times_both_planners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure11, "SOLVES", 1)
    rows = "n_device,C_e,time\n64,1,0.0005\n128,4,0.002\n"
    (tmp_path / published.PLANNER).write_text(rows)
    assert run_figure(figure11, "--toy", "--work-dir", tmp_path, "--published", tmp_path) == 0
    written = json.loads((tmp_path / "figure11-toy" / "result.json").read_text())
    (table,) = written["tables"]
    assert [row["paper"] for row in table["rows"]] == [0.5, None, None, 2.0]
    assert all(row[name] > 0 for row in table["rows"] for name in figure11.STRATEGIES)


def test_figure_11_runs_itself_on_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_figure(figure11, "--slurm", "--dry-run", "--srun", "--partition cpu") == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:7] == ["srun", "--nodes", "1", "--ntasks", "1", "--partition", "cpu"]
    assert Path(words[8]).samefile(figure11.__file__) and words[9] == "--here"


REFUSED = [
    (figure8, [], "one of the arguments --toy --slurm is required"),
    (figure8, ["--toy", "--slurm"], "not allowed with"),
    (figure8, ["--toy", "--dry-run", "--collect"], "not allowed with"),
    (figure8, ["--toy", "--nodes", "2"], "--nodes is for --slurm"),
    (figure8, ["--toy", "--data-prefix", "a"], "--data-prefix is for --slurm"),
    (figure8, ["--slurm", "--data-prefix", "a"], "--slurm needs --data-prefix and --tokenizer"),
    (figure8, ["--slurm", *DATA, "--nodes", "3"], "(choose from 1, 2, 4)"),
    (figure8, ["--slurm", *DATA], "sbatch, which is not here"),
    (figure8, ["--slurm", *DATA, "--dry-run", "--sbatch", "'a"], '--sbatch "\'a"'),
    (figure8, ["--toy", "--models", "tiny-moe"], "invalid choice: 'tiny-moe'"),
    (figure9, ["--toy", "--methods", "laer"], "invalid choice: 'laer'"),
    (figure9, ["--toy", "--steps", "1"], "'1' is no integer in 2..100000"),
    (figure9, ["--toy", "--", "--train-iters=3"], "give --steps"),
    (figure12, ["--toy", "--published", "/nowhere"], "--published '/nowhere' is no folder"),
    (figure12, ["--toy", "--work-dir", ""], "--work-dir '': the path is empty"),
    (figure11, ["--toy", "--dry-run"], "are for --slurm"),
    (figure11, ["--here", "--srun", "x"], "are for --slurm"),
    (figure11, ["--toy", "--work-dir", "/dev/null/x"], "is no folder"),
]


@pytest.mark.parametrize(("figure", "words", "said"), REFUSED)
def test_what_cannot_be_is_refused(
    figure: Any,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_figure(figure, *words) == 2
    assert said in capsys.readouterr().err
