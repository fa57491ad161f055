"""The paper's experiments balance in the paper's order; at night they run as jobs of Slurm too.

Each day figure 8 trains one model for a few steps, here. At night the commands of docs/paper.md run
as they stand (`test_documented_commands.py`), and `check_toys` judges all that they wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.device import CPU_FLAGS
from scripts.paper import figure8, runner
from scripts.paper.experiments import TOY_RANKS
from tests import processes
from tests.distributed.test_slurm import TWO_NODES
from tests.slurm import Cluster

_ROOT = Path(__file__).resolve().parents[2]


def tables(
    words: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> list[list[dict[str, Any]]]:
    result = processes.run(
        [sys.executable, *words], timeout_s=3600.0, env=dict(environment), cwd=_ROOT
    )
    logs = [path.read_text()[-2000:] for path in folder.rglob("*.log")]
    assert result.returncode == 0, "\n".join([result.stdout, result.stderr, *logs])
    (path,) = folder.glob("*/result.json")
    assert f"Figure {json.loads(path.read_text())['figure']}. " in result.stdout
    return written(path.parent)


def written(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the tables that a figure's command wrote."""
    found = json.loads((folder / "result.json").read_text())
    return [table["rows"] for table in found["tables"]]


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["ours"] is not None]


def check_order(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Check that FSEP balances best, LAER next, and a static layout last; return max/mean."""
    balance = {row["ours"]: row["max/mean"] for row in ours(rows)}
    assert 1 <= balance["fsep"] < balance["laer"] < balance["static"] < 2, balance
    assert balance["fsep"] < 1.01, balance
    return balance


def check_toys(folder: Path) -> None:
    """Check the results of all commands of the page that train."""
    (end_to_end,) = written(folder / "figure8-toy")
    for case in {(row["model"], row["aux"]) for row in end_to_end}:
        rows = [row for row in end_to_end if (row["model"], row["aux"]) == case]
        assert check_order(rows)["stock"] is None
        assert all(row["s"] > 0 and row["speed"] > 0 for row in ours(rows))
    runs, answers = written(folder / "figure9-toy")
    losses = [row["final loss"] for row in runs]
    # Uniform predictions of bytes would give 5.5.
    assert len(losses) == 3 and max(losses) < 4.5 and max(losses) - min(losses) < 0.3, losses
    assert all(row["ours"] is not None for row in answers[:4])
    _, _, tokens, _ = written(folder / "figure10-toy")
    for model in {row["model"] for row in tokens}:
        rows = [row for row in ours(tokens) if row["model"] == model]
        assert check_order(rows)["static"] < min(row["stock's placement"] for row in rows)
    (ablation,) = written(folder / "figure12-toy")
    balance = check_order(ablation)
    assert len(balance) == len(ours(ablation)) >= 5
    assert max(balance.values()) == balance["static"]


def log_of(flags: list[str]) -> str:
    """Train, and return what Megatron prints on this rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(flags)
    return output.getvalue()


def test_a_toy_balances_in_the_papers_order(ranks: RankPools, tmp_path: Path) -> None:
    def launched(words: list[str], stdout: IO[str], **_: Any) -> None:
        flags = words[words.index(str(runner.SCRIPT)) + 1 :]
        stdout.write(ranks(TOY_RANKS).run(log_of, flags)[-1])

    def run(*words: str) -> int:
        given = ["--toy", "--models", "mixtral-8x7b-e8k2", "--steps", "4", *words]
        given = ["--work-dir", str(tmp_path), *given]
        return runner.main(figure8.EXPERIMENT, figure8.tables, given)

    with mock.patch.object(runner, "subprocess", mock.Mock(run=launched)):
        assert run("--methods", "static") == 0
        # A late plan would leave a static layout in force.
        assert run("--methods", "laer", "fsep", "--", "--fsep-late-plan", "wait") == 0
    assert run("--methods", "static", "laer", "fsep", "--collect") == 0
    (rows,) = written(tmp_path / "figure8-toy")
    assert [*check_order(rows)] == ["static", "laer", "fsep"]


@pytest.mark.nightly
@pytest.mark.slurm
def test_a_job_of_the_breakdown_is_waited_for(
    slurm_cluster: Cluster, text_data: str, tmp_path: Path
) -> None:
    """Train on two nodes of Slurm, with a model that two CPU ranks can hold."""
    sizes = """
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16
        --num-query-groups 2 --ffn-hidden-size 64 --moe-ffn-hidden-size 64 --seq-length 64
        --max-position-embeddings 64 --global-batch-size 8 --num-workers 0 --fsep-capacity 5
        --expert-model-parallel-size 2
    """
    words = ["scripts/paper/figure10.py", "--slurm", "--work-dir", str(tmp_path)]
    words += ["--data-prefix", text_data, "--tokenizer", "bytes", "--steps", "3"]
    words += ["--models", "mixtral-8x7b-e8k2", "--methods", "fsep"]
    words += [f"--sbatch={' '.join(TWO_NODES)}", "--", *CPU_FLAGS, *sizes.split()]
    environment = slurm_cluster.environment(
        PYTHON=sys.executable, PYTHONPATH=processes.python_path(), MEGATRON_LAER_DEVICE="cpu"
    )
    times, _, tokens, _ = tables(words, tmp_path, environment)
    (row,) = ours(times)
    assert min(row["tokens s"], row["experts s"], row["rest s"]) > 0 and row["exposed s"] >= 0
    (row,) = ours(tokens)
    assert 1 <= row["max/mean"] < 1.05 < row["stock's placement"] < 2


@pytest.mark.nightly
@pytest.mark.slurm
def test_the_planner_is_timed_on_a_node_of_slurm(slurm_cluster: Cluster, tmp_path: Path) -> None:
    words = ["scripts/paper/figure11.py", "--slurm", "--work-dir", str(tmp_path)]
    environment = slurm_cluster.environment(PYTHONPATH=processes.python_path())
    (rows,) = tables(words, tmp_path, environment)
    assert len(rows) == 25 and {row["capacity"] for row in rows} == {1, 2, 4, 8, 16}
    assert all(row["laer"] > 0 and row["greedy"] > 0 for row in rows)
