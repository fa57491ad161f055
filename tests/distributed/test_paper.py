"""The paper's experiments run at toy scale, at night; their commands have unit tests each day."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.device import CPU_FLAGS
from tests import processes
from tests.distributed.test_slurm import TWO_NODES
from tests.slurm import Cluster

pytestmark = pytest.mark.nightly

_ROOT = Path(__file__).resolve().parents[2]


def toy(figure: int, folder: Path) -> list[list[dict[str, Any]]]:
    script = f"scripts/paper/figure{figure}.py"
    environment = os.environ | {"PYTHONPATH": processes.python_path()}
    return tables([script, "--toy", "--work-dir", str(folder)], folder, environment)


def tables(
    words: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> list[list[dict[str, Any]]]:
    result = processes.run(
        [sys.executable, *words], timeout_s=3600.0, env=dict(environment), cwd=_ROOT
    )
    logs = [path.read_text()[-2000:] for path in folder.rglob("*.log")]
    assert result.returncode == 0, "\n".join([result.stdout, result.stderr, *logs])
    (path,) = folder.glob("*/result.json")
    written = json.loads(path.read_text())
    assert f"Figure {written['figure']}. " in result.stdout
    return [table["rows"] for table in written["tables"]]


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["ours"] is not None]


def check_breakdown(times: list[dict[str, Any]], tokens: list[dict[str, Any]]) -> None:
    for row in ours(times):
        assert min(row["tokens s"], row["experts s"], row["rest s"]) > 0
        assert row["exposed s"] >= 0
    for row in ours(tokens):
        assert 1 <= row["max/mean"] < 2 and 1 < row["stock's placement"] < 2
        if row["ours"] == "fsep":
            assert row["max/mean"] < 1.05


@pytest.mark.slurm
@pytest.mark.counts(slurm_jobs=1)
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
    check_breakdown(times, tokens)
    assert len(ours(times)) == 1


@pytest.mark.slurm
@pytest.mark.counts(slurm_jobs=1)
def test_the_planner_is_timed_on_a_node_of_slurm(slurm_cluster: Cluster, tmp_path: Path) -> None:
    words = ["scripts/paper/figure11.py", "--slurm", "--work-dir", str(tmp_path)]
    environment = slurm_cluster.environment(PYTHONPATH=processes.python_path())
    (rows,) = tables(words, tmp_path, environment)
    assert len(rows) == 25 and {row["capacity"] for row in rows} == {1, 2, 4, 8, 16}
    assert all(row["laer"] > 0 and row["greedy"] > 0 for row in rows)


def test_end_to_end_runs(tmp_path: Path) -> None:
    (rows,) = toy(8, tmp_path)
    assert len(ours(rows)) == 8
    assert all(row["s"] > 0 and row["speed"] > 0 for row in ours(rows))
    assert [row["max/mean"] is None for row in ours(rows)] == [True, False, False, False] * 2


def test_convergence_runs_and_all_three_learn_alike(tmp_path: Path) -> None:
    runs, answers = toy(9, tmp_path)
    losses = [row["final loss"] for row in runs]
    # Uniform predictions of bytes would give 5.5.
    assert len(losses) == 3 and max(losses) < 4.5
    assert max(losses) - min(losses) < 0.3
    found = {row[""]: row["ours"] for row in answers}
    (error,) = (value for name, value in found.items() if name.startswith("mean relative error"))
    assert error < 0.01, "all start with the same weights"


def test_breakdown_runs(tmp_path: Path) -> None:
    times, exchanges, tokens, layers = toy(10, tmp_path)
    assert len(ours(times)) == len(ours(exchanges)) == len(ours(tokens)) == 6
    assert all(0 < row["share"] < 1 and row["speed"] > 0 for row in ours(exchanges))
    assert [row["layer"] for row in layers] == [1, 2, 1, 2]
    check_breakdown(times, tokens)


def test_ablation_runs(tmp_path: Path) -> None:
    (rows,) = toy(12, tmp_path)
    found = {row["ours"]: row for row in ours(rows)}
    assert len(found) == 11
    assert found["static"]["speed"] == 1.0
    assert all(row["s"] > 0 for row in found.values())
    # Planned layouts balance microbatches better than a static one.
    for name in ("laer", "fsep", "exact", "unscheduled"):
        assert found[name]["max/mean"] < found["static"]["max/mean"]
