"""The page's figures are thinned out and rounded here, to what a screen can show.

Steps are put into bins of equal length, and each figure has the means of its bins; tables and the
verdict are worked out from all steps. Everything is plain lists and numbers, ready for JSON.

Legend: T steps, B bins of steps, L MoE layers, N ranks, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.tools.report.run_data import Float64, RunData
from megatron_laer.tools.report.verdict import Verdict

# Bins of the finest figures, as wide as a screen has columns to tell apart, and cells of a figure
# that has a picture for each layer.
MOST_BINS = 240
_MOST_CELLS = 80_000
_MOST_POINTS = 1500
_WORST = 10

# A step's time by kind, from the parts that were measured; the rest is dense layers and optimizer.
KINDS = ("dense layers", "dispatch", "experts", "combine", "waits for restores", "for gradients")


def figures(run: RunData, verdict: Verdict) -> dict[str, Any]:
    """Return what the page draws, by figure; what there is no data for is left out."""
    edges = bin_edges(len(run.steps_T), MOST_BINS)
    found: dict[str, Any] = {
        "layers": list(run.shape.layers),
        "bins": _bin_names(run, edges),
        "node_size": run.shape.node_size,
        "heat": {
            "fsep": rounded(binned(run.imbalance_TL, edges).T),
            "stock": rounded(binned(run.stock_TL, edges).T),
        },
        "lost": {
            "fsep": rounded(verdict.lost_ms_L),
            "stock": rounded(verdict.stock_lost_ms_L),
        },
        "ranks": _ranks(run, edges),
        "memory": _memory(run, edges),
        "guard": _guard(run),
        "worst": _worst(run),
    }
    if run.is_measured:
        found["times"] = _times(run, edges)
        found["calibration"] = _calibration(run)
    if run.experts_TLE is not None:
        found["experts"] = _experts(run)
    if run.layouts:
        found["replicas"] = _replicas(run)
    if run.loss:
        found["loss"] = _loss(run.loss)
    return found


def bin_edges(number: int, most: int) -> list[int]:
    """Divide so many steps into at most `most` bins of equal length; the last may be shorter."""
    length = max(1, -(-number // most))
    return [*range(0, number, length), number]


def binned(values: Float64, edges: Sequence[int]) -> Float64:
    """Return the means of each bin along the first axis, of what is there."""
    is_there = np.isfinite(values)
    starts = np.array(edges[:-1])
    sums = np.add.reduceat(np.where(is_there, values, 0.0), starts, axis=0)
    numbers = np.add.reduceat(is_there.astype(np.float64), starts, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Float64 = sums / numbers
    return means


def rounded(values: npt.ArrayLike, digits: int = 4) -> Any:
    """Return nested lists of numbers with so many digits; None for what is not there."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    if array.ndim == 0:
        return _short(float(array), digits)
    return [_short(value, digits) for value in array.tolist()]


def _short(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short


def _bin_names(run: RunData, edges: Sequence[int]) -> list[list[int]]:
    """Return the first and last step of each bin."""
    steps = run.steps_T.tolist()
    return [[steps[begin], steps[end - 1]] for begin, end in itertools.pairwise(edges)]


def _times(run: RunData, edges: Sequence[int]) -> dict[str, Any]:
    """Divide a step's time by kind. Waits for restores are within the experts' time."""
    of = {name: np.nan_to_num(values) for name, values in run.of_steps.items()}
    experts_ms = np.maximum(of["experts_ms"] - of["restore_wait_ms"], 0.0)
    parts = [
        of["dispatch_ms"],
        experts_ms,
        of["combine_ms"],
        of["restore_wait_ms"],
        of["reduce_wait_ms"],
    ]
    dense_ms = np.maximum(of["step_ms"] - np.sum(parts, axis=0), 0.0)
    ms_KB = [binned(part, edges) for part in (dense_ms, *parts)]
    return {"kinds": list(KINDS), "ms": rounded(np.array(ms_KB))}


def _ranks(run: RunData, edges: Sequence[int]) -> dict[str, Any]:
    """Return each rank's tokens over the mean: by bin over all layers, and by layer."""

    def shares(tokens_TLN: npt.NDArray[np.int64]) -> dict[str, Any]:
        by_step_TN = _over_mean(tokens_TLN.sum(axis=1))
        by_layer_LN = _over_mean(tokens_TLN.sum(axis=0))
        return {
            "steps": rounded(binned(by_step_TN, edges).T),
            "layers": rounded(by_layer_LN.T),
        }

    found = {"fsep": shares(run.rank_tokens_TLN)}
    if run.stock_rank_tokens_TLN is not None:
        found["stock"] = shares(run.stock_rank_tokens_TLN)
    return found


def _over_mean(tokens: npt.NDArray[np.int64]) -> Float64:
    mean = tokens.mean(axis=-1, keepdims=True)
    over: Float64 = np.where(mean > 0, tokens / np.maximum(mean, 1e-9), np.nan)
    return over


def _experts(run: RunData) -> dict[str, Any]:
    """Return each expert's share of tokens over an even share, by layer and bin."""
    assert run.experts_TLE is not None
    tokens_TLE = run.experts_TLE
    num_layers, num_experts = tokens_TLE.shape[1:]
    most = max(1, min(MOST_BINS, _MOST_CELLS // (num_layers * num_experts)))
    edges = bin_edges(len(run.steps_T), most)
    summed_BLE = np.add.reduceat(tokens_TLE, np.array(edges[:-1]), axis=0)
    share_BLE = _over_mean(summed_BLE)
    total_LE = tokens_TLE.sum(axis=0)
    return {
        "bins": _bin_names(run, edges),
        "share": [rounded(share_BLE[:, layer].T, 3) for layer in range(num_layers)],
        "dead": (total_LE == 0).sum(axis=1).tolist(),
        "gini": rounded([_gini(row_E) for row_E in total_LE], 3),
        "drift": rounded(_drift(share_BLE), 3),
    }


def _gini(tokens_E: npt.NDArray[np.int64]) -> float:
    """Return the Gini coefficient: 0 where experts are equally wanted, near 1 for a single one."""
    ordered_E = np.sort(tokens_E)
    total = float(ordered_E.sum())
    if total == 0:
        return math.nan
    place_E = np.arange(1, len(ordered_E) + 1)
    number = len(ordered_E)
    return float(2 * (place_E * ordered_E).sum() / (number * total) - (number + 1) / number)


def _drift(share_BLE: Float64) -> list[float]:
    """Return by layer how like neighbouring bins are: the mean cosine of experts' shares."""
    share_BLE = np.nan_to_num(share_BLE)
    found = []
    for layer in range(share_BLE.shape[1]):
        one, other = share_BLE[:-1, layer], share_BLE[1:, layer]
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        products = (one * other).sum(axis=1)
        found.append(float(np.mean(products[norms > 0] / norms[norms > 0])) if norms.any() else 1.0)
    return found


def _replicas(run: RunData) -> dict[str, Any]:
    """Return replicas of each expert by layer and bin, as of the bin's last layouts."""
    num_layers, num_experts = len(run.shape.layers), run.shape.num_experts
    most = max(1, min(MOST_BINS, _MOST_CELLS // (num_layers * num_experts)))
    edges = bin_edges(len(run.steps_T), most)
    names = _bin_names(run, edges)
    at, by_bin, changed_B = -1, [], []
    # A run begins with static layouts, which are not recorded.
    static = ExpertLayout.static(run.shape.num_ranks, run.shape.capacity, num_experts)
    before_first = [static] * num_layers if run.steps_T[0] == 0 else None
    for _, last in names:
        changed = 0
        while at + 1 < len(run.layouts) and run.layouts[at + 1][0] <= last:
            before = run.layouts[at][1] if at >= 0 else before_first
            if before is not None:
                after = run.layouts[at + 1][1]
                changed += sum(
                    int((one.slot_expert_S != other.slot_expert_S).sum())
                    for one, other in zip(before, after, strict=True)
                )
            at += 1
        layouts = run.layouts[at][1] if at >= 0 else before_first
        changed_B.append(changed)
        by_bin.append(
            np.full((num_layers, num_experts), np.nan)
            if layouts is None
            else np.array([layout.replicas_E for layout in layouts], dtype=np.float64)
        )
    replicas_BLE = np.array(by_bin)
    fetched_B = [
        float(np.nansum(run.of_layers["changed_slots"][begin:end]))
        for begin, end in itertools.pairwise(edges)
    ]
    return {
        "bins": names,
        "number": [rounded(replicas_BLE[:, layer].T) for layer in range(num_layers)],
        "planned_slots": changed_B,
        "fetched_slots": rounded(fetched_B),
        "slot_bytes": _slot_bytes(run.settings),
    }


def _slot_bytes(settings: Sequence[tuple[str, str]]) -> int | None:
    """Return the bytes of an expert's weights, from the settings that a run noted."""
    of = dict(settings)
    try:
        hidden, ffn, each = (int(of[name]) for name in ("hidden", "ffn", "bytes_per_element"))
    except (KeyError, ValueError):
        return None
    return (3 if of.get("gated") == "True" else 2) * hidden * ffn * each


def _guard(run: RunData) -> dict[str, Any]:
    """Return the guard's choices, one point per step and layer, thinned out evenly."""
    of = run.of_layers
    gain_TL, cost_TL = of["gain_ms"], of["cost_ms"]
    weighed = np.flatnonzero(np.isfinite(gain_TL.ravel()) & np.isfinite(cost_TL.ravel()))
    chosen = weighed[:: max(1, -(-len(weighed) // _MOST_POINTS))]
    share_TL = np.divide(of["fresh"], np.maximum(of["passes"], 1))
    found = {
        "gain_ms": rounded(gain_TL.ravel()[chosen]),
        "cost_ms": rounded(cost_TL.ravel()[chosen]),
        "fresh": rounded(share_TL.ravel()[chosen], 2),
        "fresh_share": _short(_share(of), 4),
    }
    if run.is_measured:
        taken_TL, change_TL = of["taken_cost_ms"], of["change_ms"]
        both = np.flatnonzero(np.isfinite(taken_TL.ravel()) & np.isfinite(change_TL.ravel()))
        chosen = both[:: max(1, -(-len(both) // _MOST_POINTS))]
        found["taken_cost_ms"] = rounded(taken_TL.ravel()[chosen])
        found["change_ms"] = rounded(change_TL.ravel()[chosen])
    return found


def _share(of_layers: Mapping[str, Float64]) -> float:
    """Return the share of passes with a layout of their own."""
    passes = float(np.nansum(of_layers["passes"]))
    return float(np.nansum(of_layers["fresh"])) / passes if passes else math.nan


def _calibration(run: RunData) -> dict[str, Any]:
    """Return predicted and measured layer times, and how much longer a layer took than predicted.

    The factor is the median over steps and layers, which first steps do not move.
    """
    predicted_TL, measured_TL = run.of_layers["predicted_ms"], run.of_layers["layer_ms"]
    both = np.flatnonzero(np.isfinite(predicted_TL.ravel()) & np.isfinite(measured_TL.ravel()))
    predicted, measured = predicted_TL.ravel()[both], measured_TL.ravel()[both]
    chosen = slice(None, None, max(1, -(-len(both) // _MOST_POINTS)))
    factors = measured[predicted > 0] / predicted[predicted > 0]
    return {
        "predicted_ms": rounded(predicted[chosen]),
        "layer_ms": rounded(measured[chosen]),
        "factor": _short(float(np.median(factors)), 4) if factors.size else None,
    }


def _memory(run: RunData, edges: Sequence[int]) -> dict[str, Any]:
    """Return tokens of the busiest rank beside the bound, and bytes where they were measured."""
    of = run.of_layers
    found = {
        "largest_tokens": rounded(binned(_largest(of["largest_tokens"]), edges)),
        "least_tokens": rounded(binned(_largest(of["least_tokens"]), edges)),
    }
    for name in ("used_bytes", "headroom_bytes"):
        if name in run.of_steps:
            found[name] = rounded(binned(run.of_steps[name], edges))
    return found


def _largest(values_TL: Float64) -> Float64:
    """Return the largest of a step's layers; NaN without any."""
    largest = np.where(np.isfinite(values_TL), values_TL, -np.inf).max(axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)


def _loss(loss: Sequence[tuple[int, float]]) -> dict[str, Any]:
    stride = max(1, -(-len(loss) // MOST_BINS))
    return {
        "steps": [step for step, _ in loss[::stride]],
        "loss": rounded([value for _, value in loss[::stride]]),
    }


def _worst(run: RunData) -> list[dict[str, Any]]:
    """Return the steps and layers with the largest max/mean."""
    ratio_TL = np.nan_to_num(run.imbalance_TL, nan=0.0)
    order = np.argsort(-ratio_TL, axis=None, kind="stable")[:_WORST]
    found = []
    for place in order.tolist():
        step, layer = divmod(place, ratio_TL.shape[1])
        found.append(
            {
                "step": int(run.steps_T[step]),
                "layer": run.shape.layers[layer],
                "fsep": _short(float(run.imbalance_TL[step, layer]), 4),
                "stock": _short(float(run.stock_TL[step, layer]), 4),
            }
        )
    return found
