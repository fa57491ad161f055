"""The paper's experiments run at toy scale: the cheapest training here, all of them nightly."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import processes

_ROOT = Path(__file__).resolve().parents[2]


def toy(figure: int, folder: Path, words: Sequence[str] = ()) -> list[list[dict[str, Any]]]:
    """Run a figure's command as users do; the rows of its tables."""
    script = f"scripts/paper/figure{figure}.py"
    result = processes.run(
        [sys.executable, script, "--toy", "--work-dir", str(folder), *words],
        timeout_s=3600.0,
        env=os.environ | {"PYTHONPATH": processes.python_path()},
        cwd=_ROOT,
    )
    logs = [path.read_text()[-2000:] for path in folder.rglob("*.log")]
    assert result.returncode == 0, "\n".join([result.stdout, result.stderr, *logs])
    assert f"Figure {figure}. " in result.stdout
    written = json.loads((folder / f"figure{figure}-toy" / "result.json").read_text())
    return [table["rows"] for table in written["tables"]]


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of what was trained."""
    return [row for row in rows if row["ours"] is not None]


def check_breakdown(times: list[dict[str, Any]], tokens: list[dict[str, Any]]) -> None:
    for row in ours(times):
        assert min(row["tokens s"], row["experts s"], row["rest s"]) > 0
        assert row["exposed s"] >= 0
    for row in ours(tokens):
        # Of two ranks.
        assert 1 <= row["max/mean"] < 2 and 1 < row["stock's placement"] < 2
        if row["ours"] == "fsep":
            assert row["max/mean"] < 1.01


def test_one_training_of_the_breakdown_runs(tmp_path: Path) -> None:
    words = ["--models", "mixtral-8x7b-e8k2", "--methods", "fsep", "--steps", "3"]
    times, tokens = toy(10, tmp_path, words)
    assert len(ours(times)) == len(ours(tokens)) == 1
    check_breakdown(times, tokens)


@pytest.mark.nightly
def test_end_to_end_runs(tmp_path: Path) -> None:
    (rows,) = toy(8, tmp_path)
    assert len(ours(rows)) == 8
    assert all(row["s"] > 0 and row["speed"] > 0 for row in ours(rows))
    assert [row["max/mean"] is None for row in ours(rows)] == [True, False, False, False] * 2


@pytest.mark.nightly
def test_convergence_runs_and_all_three_learn_alike(tmp_path: Path) -> None:
    runs, answers = toy(9, tmp_path)
    losses = [row["final loss"] for row in runs]
    # Bytes that are all alike have 5.5.
    assert len(losses) == 3 and max(losses) < 4.5
    assert max(losses) - min(losses) < 0.3
    assert all(row["ours"] is not None for row in answers[:4])


@pytest.mark.nightly
def test_breakdown_runs(tmp_path: Path) -> None:
    times, tokens = toy(10, tmp_path)
    assert len(ours(times)) == len(ours(tokens)) == 6
    check_breakdown(times, tokens)


@pytest.mark.nightly
def test_ablation_runs(tmp_path: Path) -> None:
    (rows,) = toy(12, tmp_path)
    found = {row["ours"]: row for row in ours(rows)}
    assert len(found) == 9
    assert found["static"]["speed"] == 1.0
    assert all(row["s"] > 0 for row in found.values())
    # With exact splits or a layout of their own, microbatches are balanced; a static one is not.
    for name in ("fsep", "exact", "unscheduled"):
        assert found[name]["max/mean"] < found["static"]["max/mean"]
