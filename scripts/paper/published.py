"""The artifact's files are read here, in place; what `benchmarks` reads of them it reads for us."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published_cells import read_tokens

END_TO_END = "laer_ae_e2e_wikitext.csv"
# `convergence_analysis_backup.csv` of the artifact.
CONVERGENCE = "laer_ae_convergence.csv"
BREAKDOWN = "laer_ae_breakdown_seconds.csv"
TOKENS = ("laer_ae_tokens_e8k2.csv", "laer_ae_tokens_e16k4.csv")
PLANNER = "laer_ae_planner_seconds.csv"
ABLATION = "laer_ae_ablation_ms.csv"

# The microbatches that the paper's figure shows.
_SHOWN = {"e8k2": slice(5, 10), "e16k4": slice(25, 30)}


@dataclass(frozen=True)
class Curve:
    """A published training: losses, and seconds of each step."""

    losses: Sequence[float]
    step_s: Sequence[float]


def missing(folder: Path | None, names: Sequence[str]) -> list[str]:
    """Say which of the artifact's files are not there."""
    if folder is None:
        return [f"The paper's columns need {', '.join(names)}: give --published FOLDER."]
    return [
        f"{folder} has no {name}, so the paper's columns are empty."
        for name in names
        if not (folder / name).is_file()
    ]


def read_curves(folder: Path) -> dict[tuple[str, float], Curve]:
    """Read the convergence runs by method and auxiliary loss."""
    rows: dict[tuple[str, float], list[tuple[int, float, float]]] = {}
    with (folder / CONVERGENCE).open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["method"], float(row["aux_loss"])
            step = int(row["iter"]), float(row["loss"]), float(row["time"]) / 1e3
            rows.setdefault(key, []).append(step)
    return {
        key: Curve([loss for _, loss, _ in sorted(steps)], [time for _, _, time in sorted(steps)])
        for key, steps in rows.items()
    }


def read_balance(folder: Path) -> dict[tuple[str, str], float]:
    """Read max/mean tokens per rank by family and method, mean of layers and shown microbatches."""
    return {
        key: float((tokens_LMN.max(axis=2) / tokens_LMN.mean(axis=2)).mean())
        for key, tokens_LMN in read_tokens(folder, _SHOWN).items()
    }


def read_planner(folder: Path) -> Mapping[tuple[int, int], float]:
    """Read the solve time of the artifact's planner in seconds, by ranks and capacity."""
    with (folder / PLANNER).open(newline="") as file:
        return {
            (int(row["n_device"]), int(row["C_e"])): float(row["time"])
            for row in csv.DictReader(file)
        }
