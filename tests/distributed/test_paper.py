"""The paper's experiments run as jobs of Slurm, at night; their commands have unit tests each day.

At toy scale the commands of docs/paper.md run them (`test_documented_commands.py`).
"""

from __future__ import annotations

import json
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


@pytest.mark.slurm
def test_the_planner_is_timed_on_a_node_of_slurm(slurm_cluster: Cluster, tmp_path: Path) -> None:
    words = ["scripts/paper/figure11.py", "--slurm", "--work-dir", str(tmp_path)]
    environment = slurm_cluster.environment(PYTHONPATH=processes.python_path())
    (rows,) = tables(words, tmp_path, environment)
    assert len(rows) == 25 and {row["capacity"] for row in rows} == {1, 2, 4, 8, 16}
    assert all(row["laer"] > 0 and row["greedy"] > 0 for row in rows)
