"""Readers of the artifact's files, in place; `benchmarks` reads those that it needs itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published_files import END_TO_END as END_TO_END
from benchmarks.published_files import read_tokens
from benchmarks.published_table import below, not_negative, positive, read_rows, text

# `convergence_analysis_backup.csv` of the artifact.
CONVERGENCE = "laer_ae_convergence.csv"
BREAKDOWN = "laer_ae_breakdown_seconds.csv"
TOKENS = ("laer_ae_tokens_e8k2.csv", "laer_ae_tokens_e16k4.csv")
PLANNER = "laer_ae_planner_seconds.csv"
ABLATION = "laer_ae_ablation_ms.csv"

# Bounds on the steps of a convergence run, whose first steps are not counted.
_FEWEST_STEPS, _MOST_STEPS = 2, 10**8
# The microbatches in the paper's figure.
_SHOWN = {"e8k2": slice(5, 10), "e16k4": slice(25, 30)}


@dataclass(frozen=True)
class Curve:
    """A published training: losses, and seconds of each step."""

    losses: Sequence[float]
    step_s: Sequence[float]


def missing(folder: Path | None, names: Sequence[str]) -> list[str]:
    """Return a sentence for each missing file of the artifact."""
    if folder is None:
        return [f"The paper's columns need {', '.join(names)}: give --published FOLDER."]
    return [
        f"{folder} has no {name}, so the paper's columns are empty."
        for name in names
        if not (folder / name).exists()
    ]


def read_curves(folder: Path) -> dict[tuple[str, float], Curve]:
    """Read the convergence runs by method and auxiliary loss; raise ValueError for a bad table."""
    columns = {
        "method": text,
        "aux_loss": not_negative,
        "iter": below(_MOST_STEPS),
        "loss": positive,
        "time": positive,
    }
    key = ("method", "aux_loss", "iter")
    runs: dict[tuple[str, float], list[tuple[int, float, float]]] = {}
    for row in read_rows(folder / CONVERGENCE, columns, key=key):
        step = row["iter"], row["loss"], row["time"] / 1e3
        runs.setdefault((row["method"], row["aux_loss"]), []).append(step)
    for (method, aux), steps in runs.items():
        if len(steps) < _FEWEST_STEPS:
            raise ValueError(
                f"{folder / CONVERGENCE}: {method} with auxiliary loss {aux:g} has {len(steps)} "
                f"steps, expected at least {_FEWEST_STEPS}"
            )
    return {
        key: Curve([loss for _, loss, _ in sorted(steps)], [time for _, _, time in sorted(steps)])
        for key, steps in runs.items()
    }


def read_balance(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Read each layer's max/mean tokens by family and method, mean of shown microbatches."""
    return {
        key: (tokens_LMN.max(axis=2) / tokens_LMN.mean(axis=2)).mean(axis=1).tolist()
        for key, tokens_LMN in read_tokens(folder, _SHOWN).items()
    }


def read_planner(folder: Path) -> Mapping[tuple[int, int], float]:
    """Read the artifact's solve times in seconds, by ranks and capacity.

    Raises ValueError for a bad table.
    """
    columns = {"n_device": below(2**20), "C_e": below(2**20), "time": positive}
    rows = read_rows(folder / PLANNER, columns, key=("n_device", "C_e"))
    return {(row["n_device"], row["C_e"]): row["time"] for row in rows}
