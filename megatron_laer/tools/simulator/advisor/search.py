"""Search for the fastest settings of FSEP that fit in memory, and for the fastest stock.

All settings are predicted roughly, and the best in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.advisor.predictor import Candidate, Predictor
from megatron_laer.tools.simulator.advisor.settings import Setting, geometries, settings_of
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction

# Best settings that are shown, and geometries of which close ones are predicted in full.
SHOWN, _IN_FULL = 5, 10
# Rough times up to this factor of the best's may be the best in full.
_CLOSE = 1.05
# Rough times up to this factor count as equal, and the setting nearer to training's defaults wins.
_EQUAL = 1.002
# Times in full up to this factor count as equal, and the setting with less memory wins.
_SAME = 1.005
# Fastest groups of stock that are kept: other constants may reverse their order.
_STOCKS = 2

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Found:
    """A candidate with its prediction."""

    candidate: Candidate
    prediction: IterationPrediction

    @property
    def seconds(self) -> float:
        return self.prediction.iteration_s


@dataclass(frozen=True)
class Results:
    """Results of a search, each best first.

    `stocks` and `balanced`, stock under perfectly balanced counts, fit in memory; if none does,
    `balanced` is the fastest of all. `tried` and `too_large` count settings of FSEP, and
    `least_bytes` are the fewest that a setting and a stock need, which are named.
    """

    best: tuple[Found, ...]
    stocks: tuple[Found, ...]
    balanced: Found
    tried: int
    too_large: int
    least_bytes: tuple[tuple[str, float], ...]


def search(predictor: Predictor, balanced: Predictor, progress: Progress = iter) -> Results:
    """Search all settings of a run; `balanced` predicts it with perfectly balanced counts."""
    run = predictor.run
    nominal = run.rates[:1]
    stocks, small_stock = _stocks(predictor)
    of_balanced = balanced.stocks()
    fitting = [each for each in of_balanced if balanced.fits(each)] or of_balanced
    forced = [Found(each, balanced.fully(each, nominal)) for each in fitting]
    settings = [
        setting
        for size in run.sizes
        if size > 1
        for geometry in geometries(run.model.num_experts, size, run.node_size, run.shardings)
        for setting in settings_of(
            geometry,
            run.dispatches,
            run.model.topk,
            partial(predictor.automatic, geometry),
            run.flex_backend,
        )
    ]
    rough: dict[Setting, float] = {}
    least = ("", float("inf"))
    for setting in progress(settings):
        candidate = predictor.fsep(setting)
        least = min(least, (setting.label, predictor.least_bytes(candidate)), key=lambda of: of[1])
        if predictor.fits(candidate):
            rough[setting] = float(predictor.roughly(candidate, nominal)[0])
    best, refused = _best(predictor, rough)
    return Results(
        best=_in_order(_with_ranges(predictor, best)),
        stocks=tuple(_with_ranges(predictor, stocks[:_STOCKS])),
        balanced=min(forced, key=lambda found: found.seconds),
        tried=len(settings),
        too_large=len(settings) - len(rough) + refused,
        least_bytes=(least, small_stock),
    )


def _stocks(predictor: Predictor) -> tuple[list[Found], tuple[str, float]]:
    """Return the groups of stock that fit, the fastest first, and the memory of the smallest."""
    run = predictor.run
    found, least = [], ("", float("inf"))
    for candidate in predictor.stocks():
        needed = predictor.least_bytes(candidate)
        if needed <= run.most_bytes:
            prediction = predictor.fully(candidate, run.rates[:1])
            needed = prediction.peak_bytes
            if needed <= run.most_bytes:
                found.append(Found(candidate, prediction))
        least = min(least, (candidate.label, needed), key=lambda of: of[1])
    return sorted(found, key=lambda each: each.seconds), least


def _best(predictor: Predictor, rough: dict[Setting, float]) -> tuple[list[Found], int]:
    """Return the fastest setting of each group size and sharding, and the number that do not fit.

    The best of each is predicted in full, and all others that are close to the best of all.
    """
    chosen: dict[Geometry, Setting] = {}
    for setting, seconds in rough.items():  # training's defaults come first
        known = chosen.get(setting.geometry)
        if known is None or seconds * _EQUAL < rough[known]:
            chosen[setting.geometry] = setting
    order = sorted(chosen.values(), key=lambda setting: rough[setting])
    found: dict[tuple[int, Sharding], Found] = {}
    tried, refused = 0, 0
    for setting in order:
        kind = setting.geometry.num_ranks, setting.geometry.sharding
        is_close = rough[setting] <= _CLOSE * rough[order[0]] and tried < _IN_FULL
        if not is_close and (kind in found or len(found) >= SHOWN):
            continue
        candidate = predictor.fsep(setting)
        prediction = predictor.fully(candidate, predictor.run.rates[:1])
        tried += 1
        if prediction.peak_bytes > predictor.run.most_bytes:
            refused += 1
        elif kind not in found or _is_better(prediction, found[kind].prediction):
            found[kind] = Found(candidate, prediction)
    return sorted(found.values(), key=lambda each: each.seconds)[:SHOWN], refused


def _is_better(one: IterationPrediction, other: IterationPrediction) -> bool:
    """Return True if one is faster, or as fast with less memory."""
    if max(one.iteration_s, other.iteration_s) > min(one.iteration_s, other.iteration_s) * _SAME:
        return one.iteration_s < other.iteration_s
    return one.peak_bytes < other.peak_bytes


def _in_order(found: Sequence[Found]) -> tuple[Found, ...]:
    """Return the fastest first; of those as fast, the one with least memory comes first."""
    if not found:
        return ()
    order = sorted(found, key=lambda each: each.seconds)
    same = [each for each in order if each.seconds <= order[0].seconds * _SAME]
    first = min(same, key=lambda each: each.prediction.peak_bytes)
    return first, *(each for each in order if each is not first)


def _with_ranges(predictor: Predictor, found: Sequence[Found]) -> list[Found]:
    rates = predictor.run.rates
    return [replace(each, prediction=predictor.fully(each.candidate, rates)) for each in found]
