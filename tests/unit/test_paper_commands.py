"""The commands of the paper's experiments: jobs, their parsing by Megatron, and refusals."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command_line import program
from megatron_laer.device import CPU_FLAGS
from scripts.paper import figure8, figure9, figure10, figure11, published, runner
from scripts.paper.experiments import MODELS
from tests import processes
from tests.unit.shell_scripts import fake_python
from tests.unit.test_paper import E8K2

DATA = ["--data-prefix", "/data/text", "--tokenizer", "/data/tokenizer"]


def run_figure(figure: Any, *words: object) -> int:
    given = [*map(str, words)]

    with pytest.raises(SystemExit) as stopped:
        program(figure.__name__, lambda: runner.main(figure.EXPERIMENT, figure.tables, given))
    return int(str(stopped.value.code))


def dry_run(figure: Any, capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert run_figure(figure, "--slurm", "--dry-run", *DATA, *words) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_a_job_is_submitted_for_each_run_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(figure8, capsys, "--sbatch=--partition gpu")
    assert len(lines) == len(MODELS) * 2 * 4
    outputs = {line[line.index("--output") + 1] for line in lines}
    assert len(outputs) == len(lines)
    assert all(line[line.index("--partition") + 1] == "gpu" for line in lines)
    laer = next(line for line in lines if "laer" in line)
    # 32 ranks; the test below has Megatron judge the other flags.
    for flag, value in (
        ("--nodes", "4"),
        ("--train-iters", "70"),
        ("--fsep-capacity", "2"),
        ("--tokenizer-model", "/data/tokenizer"),
    ):
        assert laer[laer.index(flag) + 1] == value
    assert lines[0][0] == "CUDA_DEVICE_MAX_CONNECTIONS=1"


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


@pytest.mark.distributed
def test_megatron_takes_what_jobs_start_on_32_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Validate the flags only; tests of pretrain.sbatch cover the rest of a job."""
    e16k4 = ["--models", "mixtral-8x22b-e16k4"]
    stock, _, laer, *_ = dry_run(figure8, capsys, *e16k4)
    wide, *_ = dry_run(figure8, capsys, "--models", "qwen-8x7b-e8k2", "--methods", "stock")
    first, high, _, fsep = dry_run(figure9, capsys)
    saved = first[first.index("--save") + 1]
    assert all(each[each.index("--load") + 1] == saved for each in (high, fsep))
    recorded = dry_run(figure10, capsys, *e16k4[:1], "mixtral-8x7b-e16k4", "--methods", "static")
    commands = [stock, wide, laer, first, high, fsep, *recorded]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "32000"]
    lines = [
        [*command[command.index(str(runner.SCRIPT)) + 1 :], *CPU_FLAGS, *tokenizer]
        for command in commands
    ]
    ranks = {"RANK": "0", "WORLD_SIZE": "32", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    found = processes.python("-c", _VALIDATE, stdin=json.dumps(lines), **ranks)
    # Expert and tensor parallelism, tokens of a rank's microbatch, microbatches, as in the paper.
    assert json.loads(found.splitlines()[-1]) == [
        ["standard", 8, 4, 8192, 16],
        ["standard", 8, 8, 8192, 32],
        ["fsep", 32, 1, 16384, 2],
        ["standard", 8, 4, 4096, 16],
        ["standard", 8, 4, 4096, 16],
        ["fsep", 32, 1, 16384, 1],
        ["fsep", 32, 1, 16384, 2],
    ]


_FAKE_SBATCH = """
while [ $# -gt 0 ]; do
    case $1 in
        --output) log=$2 ;;
        --train-iters) steps=$2 ;;
        --expert-parallel-mode) [ "$2" = fsep ] && time=100 || time=150 ;;
        # Of Qwen's models.
        --add-qkv-bias) exit 1 ;;
    esac
    shift
done
[ -z "$CHECKPOINT" ] || exit 1
for step in $(seq "$steps"); do
    echo " iteration $step/ $steps | elapsed time per iteration (ms): $time.0 | lm loss: 5.0E+00 |"
done >"$log"
"""


def test_jobs_are_waited_for_and_their_logs_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, "sbatch", _FAKE_SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # It may not apply to all runs.
    monkeypatch.setenv("CHECKPOINT", "one")
    words = ["--slurm", "--work-dir", tmp_path, "--steps", "5", "--methods", "stock", "fsep"]
    words += ["--models", E8K2]
    assert run_figure(figure8, *words, *DATA) == 0
    folder = tmp_path / "figure8-slurm"
    first = json.loads((folder / "result.json").read_text())
    speed = {row["ours"]: row["speed"] for row in first["tables"][0]["rows"]}
    assert speed == {"stock": 1.0, "fsep": pytest.approx(1.5), None: None}
    # A failed job fails the command, and not the others. An earlier log is kept.
    both = ["--methods", "fsep", "--models", E8K2, "qwen-8x7b-e8k2"]
    assert run_figure(figure8, *words[:5], *both, *DATA) == 1
    rows = json.loads((folder / "result.json").read_text())["tables"][0]["rows"]
    assert [row["s"] for row in rows if row["ours"]] == [0.1, 0.1, None, None]
    assert (folder / f"{E8K2}_aux0_fsep.2.log").exists()
    # Logs alone, without Slurm.
    monkeypatch.setenv("PATH", os.environ["PATH"].removeprefix(f"{tmp_path}:"))
    assert run_figure(figure8, *words, "--collect") == 0
    assert json.loads((folder / "result.json").read_text()) == first
    assert run_figure(figure8, *words, "qwen-8x7b-e8k2", "--collect") == 1
    assert "qwen-8x7b-e8k2_aux0_stock: no log at" in (folder / "result.txt").read_text()


def test_figure_11_times_both_planners_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure11, "SOLVES", 1)
    (tmp_path / published.PLANNER).write_text("n_device,C_e,time\n64,1,0.0005\n128,4,0.002\n")
    folders = ["--work-dir", str(tmp_path), "--published", str(tmp_path)]
    assert figure11.main(["--toy", *folders]) == 0
    written = json.loads((tmp_path / "figure11-toy" / "result.json").read_text())
    (table,) = written["tables"]
    assert [row["paper"] for row in table["rows"]] == [0.5, None, None, 2.0]
    assert all(row[name] > 0 for row in table["rows"] for name in figure11.STRATEGIES)
