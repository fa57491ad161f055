"""Readers of the files that LAER-MoE's artifact published; damaged files are refused.

The files have times of four methods on six models, ablations and a profiled iteration. They also
have the tokens that each rank received under three methods, by layer and microbatch. The use of the
data is elsewhere.

Legend: N ranks, L layers, M microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.published_table import below, not_negative, positive, read_rows, text

RANKS = 32
MEGATRON, FSDP, FLEX, LAER = "megatron", "FSDP", "FLEX", "LAER"
METHODS = (MEGATRON, FSDP, FLEX, LAER)
MODELS = (
    "mixtral-8x7b-e8k2",
    "qwen-8x7b-e8k2",
    "mixtral-8x22b-e8k2",
    "mixtral-8x7b-e16k4",
    "qwen-8x7b-e16k4",
    "mixtral-8x22b-e16k4",
)
FIT_MODELS = ("mixtral-8x7b-e8k2", "mixtral-8x7b-e16k4")
# Windows of the published microbatches: without the first, which have no plan yet, and for e16k4
# the last, which are nearest to the timed iterations.
_WINDOWS = {"e8k2": slice(2, 10), "e16k4": slice(20, 30)}
END_TO_END = "laer_ae_e2e_wikitext.csv"
# Limit beyond any model's layers and any table's microbatches or ranks.
_MOST_PLACES = 10**5
# Auxiliary loss of cells without one.
NO_LOSS = "0.0"


@dataclass(frozen=True)
class Cell:
    """One published time."""

    dataset: str
    model: str
    aux_loss: str
    method: str
    measured_s: float

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.model}, aux {self.aux_loss}"

    @property
    def family(self) -> str:
        """Return experts and top-k."""
        return self.model.rsplit("-", 1)[1]

    @property
    def is_fitted(self) -> bool:
        return self.model in FIT_MODELS


def read_cells(folder: Path) -> list[Cell]:
    """Read the published times; raise ValueError for a bad table."""
    rows = read_rows(
        folder / END_TO_END,
        {
            "dataset": text,
            "model_name": text,
            "aux_loss": lambda given: str(not_negative(given)),
            "method": text,
            "avg_time_ms": positive,
        },
        key=("dataset", "model_name", "aux_loss", "method"),
    )
    return [Cell(*values, ms / 1e3) for *values, ms in (row.values() for row in rows)]


def read_tokens(
    folder: Path, windows: Mapping[str, slice] = _WINDOWS
) -> dict[tuple[str, str], np.ndarray]:
    """Read received tokens by family and method, [L, M, N], of a window of microbatches.

    Raises ValueError for a bad table, or one that lacks a part of the window.
    """
    found = {}
    for family, window in windows.items():
        path = tokens_path(folder, family)
        cells: dict[str, dict[tuple[int, int, int], int]] = {}
        for method, *place, number in (row.values() for row in _token_rows(path)):
            cells.setdefault(method, {})[place[0], place[1], place[2]] = number
        for method, tokens in cells.items():
            shape = tuple(1 + max(place[axis] for place in tokens) for axis in range(3))
            if np.prod(shape) != len(tokens) or shape[1] < window.stop or shape[2] != RANKS:
                raise ValueError(
                    f"{path}: {method} has {len(tokens)} counts, expected one for each layer, each "
                    f"of at least {window.stop} microbatches and each of {RANKS} ranks"
                )
            # The rows may be in any order, but each occurs once.
            tokens_LMN = np.array([tokens[place] for place in sorted(tokens)]).reshape(shape)
            if not tokens_LMN.any(axis=2).all():
                raise ValueError(f"{path}: {method} has a microbatch without tokens")
            found[family, method] = tokens_LMN[:, window].astype(np.float64)
    return found


def tokens_path(folder: Path, family: str) -> Path:
    return folder / f"laer_ae_tokens_{family}.csv"


def _token_rows(path: Path) -> list[dict[str, Any]]:
    place = ("layer", "iter", "rank")
    columns = {
        "method": text,
        **dict.fromkeys(place, below(_MOST_PLACES)),
        "token_num": below(2**31),
    }
    return read_rows(path, columns, key=("method", *place))


def read_ablation(folder: Path) -> dict[str, float]:
    """Read the published times of ablations, in milliseconds; raise ValueError for a bad table."""
    columns = {"method": text, "avg_time_ms": positive}
    rows = read_rows(folder / "laer_ae_ablation_ms.csv", columns, key=("method",))
    return {row["method"]: row["avg_time_ms"] for row in rows}


class Profiled(NamedTuple):
    """Seconds of a profiled iteration, mean over ranks."""

    tokens_s: float
    expert_s: float
    total_s: float


def read_breakdown(folder: Path) -> dict[tuple[str, str], Profiled]:
    """Read token exchanges', experts' and total seconds by model and method.

    Raises ValueError for a bad table.
    """
    times = [f"{name}_time" for name in ("alltoall", "expert", "total")]
    columns = {
        "rank": below(_MOST_PLACES),
        "model_name": text,
        "method": text,
        **dict.fromkeys(times, positive),
    }
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for row in read_rows(
        folder / "laer_ae_breakdown_seconds.csv", columns, key=("rank", "model_name", "method")
    ):
        key = row["model_name"], row["method"]
        found.setdefault(key, []).append(tuple(row[name] for name in times))
    return {key: Profiled(*np.mean(times, axis=0).tolist()) for key, times in found.items()}
