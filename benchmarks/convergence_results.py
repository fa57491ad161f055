"""Differences between the convergence benchmark's runs; nothing is trained here.

The bound is measured: the distance between two runs of stock that differ in rounding only (`WAYS`
of `convergence_runs.py`). Rounding moves a router's near-ties, and the effect grows.

Legend: W windows of steps, L layers, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.convergence_runs import FSEP, NO_AUX, POINTS, ROUNDING, STOCK, Run

# Runs by way and auxiliary loss.
Runs = Mapping[tuple[str, str], Run]
Floats = npt.NDArray[np.float64]

# Allowance for one pair of runs, which is a small sample of the effect of rounding.
ROUNDINGS = 3.0


@dataclass(frozen=True)
class Gap:
    """Distance of a run from stock's under the same auxiliary loss.

    `training` and `validation` are root mean squares over windows. `experts` is the share of tokens
    that another expert of the layer got, mean over windows and layers.
    """

    training: float
    validation: float
    experts: float

    @classmethod
    def between(cls, run: Run, stock: Run) -> Gap:
        moved_WL = np.abs(shares_WLE(run) - shares_WLE(stock)).sum(axis=-1) / 2
        return cls(
            training=_distance(window_losses(run), window_losses(stock)),
            validation=_distance(run.validation, stock.validation),
            experts=float(moved_WL.mean()),
        )


@dataclass(frozen=True)
class Check:
    sentence: str
    holds: bool


def checks(runs: Runs) -> Iterator[Check]:
    for aux in auxes(runs):
        gaps = gaps_from_stock(runs, aux)
        for part in ("training", "validation", "experts"):
            fsep, rounding = (getattr(gaps[way], part) for way in (FSEP, ROUNDING))
            yield Check(
                f"aux loss {aux}, {part}: FSEP {fsep:.5f} from stock, not more than "
                f"{ROUNDINGS:g} times rounding's {rounding:.5f}",
                fsep <= ROUNDINGS * rounding,
            )
        fsep_run = runs[FSEP, aux]
        yield Check(
            f"aux loss {aux}: layouts changed {fsep_run.layouts} times", fsep_run.layouts > 0
        )
    fsep_run = runs[FSEP, NO_AUX]
    busiest, stocks = _late(fsep_run.max_over_mean), _late(fsep_run.stock_max_over_mean)
    # Limit: a tenth of the imbalance that stock's placement has with the same tokens.
    yield Check(
        f"no aux loss: max/mean over ranks is {busiest:.3f}, near 1, where stock's placement has "
        f"{stocks:.3f} and the busiest expert {busiest_expert(fsep_run):.2f} times the mean",
        busiest - 1 <= 0.1 * (stocks - 1),
    )
    yield Check("the auxiliary loss evens out the use of experts", _evened_out(runs))


def auxes(runs: Runs) -> list[str]:
    return list(dict.fromkeys(aux for _, aux in runs))


def gaps_from_stock(runs: Runs, aux: str) -> dict[str, Gap]:
    return {
        way: Gap.between(run, runs[STOCK, aux])
        for (way, of), run in runs.items()
        if of == aux and way != STOCK
    }


def rows(runs: Runs) -> list[dict[str, Any]]:
    """Return a row per run: its final losses, and the balance of experts and ranks."""
    return [
        {
            "aux loss": aux,
            "run": way,
            "training loss": window_losses(run)[-1],
            "validation loss": run.validation[-1],
            "experts max/mean": busiest_expert(run),
            "experts used": effective_experts(run),
            # With all experts on each rank, none is placed.
            "ranks max/mean": None if way == ROUNDING else _late(run.max_over_mean),
            "minutes": run.wall_s / 60,
        }
        for aux in auxes(runs)
        for way in dict.fromkeys(way for way, _ in runs)
        if (run := runs.get((way, aux))) is not None
    ]


def gap_rows(runs: Runs) -> list[dict[str, Any]]:
    """Return a row per run except stock's: its gap and its final difference from stock's."""
    return [
        {
            "aux loss": aux,
            "run less stock": way,
            "training": gap.training,
            "validation": gap.validation,
            "experts": gap.experts,
            "final training": window_losses(run)[-1] - window_losses(runs[STOCK, aux])[-1],
            "final validation": run.validation[-1] - runs[STOCK, aux].validation[-1],
        }
        for aux in auxes(runs)
        if (STOCK, aux) in runs
        for way, gap in gaps_from_stock(runs, aux).items()
        for run in (runs[way, aux],)
    ]


def window_losses(run: Run) -> list[float]:
    return np.reshape(run.losses, (POINTS, -1)).mean(axis=1).tolist()


def shares_WLE(run: Run) -> Floats:
    tokens_WLE = np.array(run.expert_tokens, dtype=np.float64)
    shares: Floats = tokens_WLE / tokens_WLE.sum(axis=-1, keepdims=True)
    return shares


def busiest_expert(run: Run) -> float:
    """Return max/mean tokens over experts in the last window, mean over layers."""
    last_LE = shares_WLE(run)[-1]
    return float((last_LE.max(axis=-1) * last_LE.shape[-1]).mean())


def effective_experts(run: Run) -> float:
    """Return the number of evenly used experts with the same entropy of tokens.

    It is the exponential of the entropy in the last window, mean over layers.
    """
    last_LE = shares_WLE(run)[-1]
    logarithms_LE = np.log(last_LE, out=np.zeros_like(last_LE), where=last_LE > 0)
    return float(np.exp(-(last_LE * logarithms_LE).sum(axis=-1)).mean())


def _evened_out(runs: Runs) -> bool:
    """Return True if each auxiliary loss makes the use of experts more even."""
    return all(
        busiest_expert(runs[way, aux]) < busiest_expert(runs[way, NO_AUX])
        for way in (STOCK, FSEP)
        for aux in auxes(runs)
        if aux != NO_AUX
    )


def _late(values: Sequence[float]) -> float:
    return statistics.fmean(values[len(values) // 2 :])


def _distance(found: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(found, expected, strict=True)
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs))
