"""Fits of constants to figures, by pure functions.

Legend: P points, T terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from megatron_laer.planner.clusters import Figure, Link, SolveTime
from megatron_laer.planner.gemm_curve import GemmCurve

_Float64 = npt.NDArray[np.float64]

# Significant digits in a file; measurements are no more accurate.
_DIGITS = 4
# Minimum growth between points of a curve, so that rounding cannot reverse their order.
_LEAST_GROWTH = 1.0 + 10.0 ** (1 - _DIGITS)


def figure_of(samples: Iterable[float]) -> Figure:
    median, low, high = np.percentile(list(samples), (50, 10, 90)).tolist()
    return Figure(rounded(median), rounded(low), rounded(high))


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def fit_curve(seconds: Sequence[tuple[int, float]], flops_per_token: float) -> GemmCurve:
    """Make a GEMM curve of a slot's (tokens, seconds).

    A point that was faster than one with fewer tokens gets the slower time.
    """
    points = []
    least_s = 0.0
    for tokens, measured_s in sorted(seconds):
        slot_s = max(measured_s, least_s)
        points.append((tokens, rounded(tokens * flops_per_token / slot_s)))
        least_s = slot_s * _LEAST_GROWTH
    return GemmCurve(tuple(points))


def fit_terms(terms_PT: _Float64, seconds_P: _Float64) -> _Float64:
    """Return the non-negative factors of least relative error, over all subsets of terms."""
    scaled_PT, num_terms = terms_PT / seconds_P[:, None], terms_PT.shape[1]
    # Scale terms to similar size, or a small one is lost in a large one's rounding.
    size_T = np.maximum(np.abs(scaled_PT).max(axis=0), np.finfo(float).tiny)
    best, best_error = np.zeros(num_terms), math.inf
    for count in range(1, num_terms + 1):
        for chosen in map(list, combinations(range(num_terms), count)):
            columns = (scaled_PT / size_T)[:, chosen]
            found, *_ = np.linalg.lstsq(columns, np.ones(len(columns)), rcond=None)
            error = float(np.square(columns @ found - 1.0).sum())
            # On equal errors, the fit with fewer terms stays.
            if (found >= 0).all() and error < best_error * (1.0 - 1e-9):
                best, best_error = np.zeros(num_terms), error
                best[chosen] = found / size_T[chosen]
    return best


def fit_link(exchanges: Sequence[tuple[int, int, float]]) -> Link:
    """Fit a link's constants to All-to-Alls, as (peers, bytes that a rank sends, seconds)."""
    peers_P, sent_P, seconds_P = (
        np.array(column, dtype=float) for column in zip(*exchanges, strict=True)
    )
    is_known = len(set(peers_P.tolist())) > 1
    terms_PT = np.stack([np.ones_like(sent_P), sent_P, peers_P * is_known], axis=1)
    latency_s, byte_s, peer_s = fit_terms(terms_PT, seconds_P).tolist()
    if byte_s == 0.0:  # so noisy that size seems not to matter
        byte_s = float((seconds_P / sent_P).min())
    return Link(rounded(1.0 / byte_s), rounded(latency_s), rounded(peer_s))


def rates_of(link: Link, exchanges: Sequence[tuple[int, int, float]]) -> list[float]:
    """Return the rates of the largest exchanges and those whose bytes take longer than latency.

    Smaller exchanges determine no rate.
    """
    largest = max(sent for _, sent, _ in exchanges)
    rates = []
    for peers, sent, seconds in exchanges:
        latency_s = link.latency_s + peers * link.peer_s
        if sent == largest or sent / link.bytes_per_s >= latency_s:
            # A message that was as fast as an empty one had at least this rate.
            rates.append(sent / max(seconds - latency_s, seconds / 10))
    return rates


def fit_solve(calls: Sequence[tuple[tuple[int, int, int], float]]) -> SolveTime:
    """Fit the planner's time to calls, as ((N, C, E), seconds)."""
    terms_PT = np.array(
        [(1, ranks * slots, ranks * experts) for (ranks, slots, experts), _ in calls]
    )
    seconds_P = np.array([seconds for _, seconds in calls])
    base_s, slot_s, count_s = fit_terms(terms_PT.astype(float), seconds_P).tolist()
    return SolveTime(rounded(base_s), rounded(slot_s), rounded(count_s))
