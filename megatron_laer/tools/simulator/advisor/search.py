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
# Fastest groups of stock that are kept: other constants may reverse their order.
_STOCKS = 2

# Wraps items that are worked on, under a title.
Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


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


def search(predictor: Predictor, balanced: Predictor, progress: Progress) -> Results:
    """Search all settings of a run; `balanced` predicts it with perfectly balanced counts."""
    run = predictor.run
    nominal = run.rates[:1]
    stocks, small_stock = _stocks(predictor, progress)
    of_balanced = balanced.stocks()
    fitting = [each for each in of_balanced if balanced.fits(each)] or of_balanced
    forced = [
        Found(each, balanced.fully(each, nominal))
        for each in progress("stock under balanced counts", fitting)
    ]
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
            run.overlaps,
        )
    ]
    rough: dict[Setting, float] = {}
    least = ("", float("inf"))
    for setting in progress("settings, roughly", settings):
        candidate = predictor.fsep(setting)
        least = min(least, (setting.label, predictor.least_bytes(candidate)), key=lambda of: of[1])
        if predictor.fits(candidate):
            rough[setting] = float(predictor.roughly(candidate, nominal)[0])
    best, refused = _best(predictor, rough, progress)
    return Results(
        best=tuple(_with_ranges(predictor, best, progress)),
        stocks=tuple(_with_ranges(predictor, stocks[:_STOCKS], progress)),
        balanced=min(forced, key=lambda found: found.seconds),
        tried=len(settings),
        too_large=len(settings) - len(rough) + refused,
        least_bytes=(least, small_stock),
    )


def _stocks(predictor: Predictor, progress: Progress) -> tuple[list[Found], tuple[str, float]]:
    """Return the groups of stock that fit, the fastest first, and the memory of the smallest."""
    run = predictor.run
    found, least = [], ("", float("inf"))
    for candidate in progress("stock", predictor.stocks()):
        needed = predictor.least_bytes(candidate)
        if needed <= run.most_bytes:
            prediction = predictor.fully(candidate, run.rates[:1])
            needed = prediction.peak_bytes
            if needed <= run.most_bytes:
                found.append(Found(candidate, prediction))
        least = min(least, (candidate.label, needed), key=lambda of: of[1])
    return sorted(found, key=lambda each: each.seconds), least


def _best(
    predictor: Predictor, rough: dict[Setting, float], progress: Progress
) -> tuple[list[Found], int]:
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
    for setting in progress("the best, in full", order):
        kind = setting.geometry.num_ranks, setting.geometry.sharding
        is_close = rough[setting] <= _CLOSE * rough[order[0]] and tried < _IN_FULL
        if not is_close and (kind in found or len(found) >= SHOWN):
            continue
        candidate = predictor.fsep(setting)
        prediction = predictor.fully(candidate, predictor.run.rates[:1])
        tried += 1
        if prediction.peak_bytes > predictor.run.most_bytes:
            refused += 1
        elif kind not in found or prediction.iteration_s < found[kind].seconds:
            found[kind] = Found(candidate, prediction)
    return sorted(found.values(), key=lambda each: each.seconds)[:SHOWN], refused


def _with_ranges(predictor: Predictor, found: Sequence[Found], progress: Progress) -> list[Found]:
    rates = predictor.run.rates
    return [
        replace(each, prediction=predictor.fully(each.candidate, rates))
        for each in progress("ranges", found)
    ]
