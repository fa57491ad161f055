"""Search for the fastest settings of FSEP that fit in memory, and for the fastest stock.

All candidates are predicted roughly, and the best in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_laer.tools.simulator.advisor.predictor import Candidate, Predictor
from megatron_laer.tools.simulator.advisor.settings import geometries, settings_of
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction
from megatron_laer.tools.simulator.output import WORTH, Option, gain, verdict

# Settings of FSEP and groups of stock that are shown, and shapes of which close ones are predicted
# in full.
_SHOWN, _STOCKS, _IN_FULL = 5, 2, 10
# Rough times up to this factor of the best's may be the best in full.
_CLOSE = 1.05
# Rough times up to this factor count as equal, and the one nearer to training's defaults wins.
_EQUAL = 1.002

# Wraps items that are worked on, under a title.
Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


class Found(NamedTuple):
    """A candidate with its prediction."""

    candidate: Candidate
    prediction: IterationPrediction

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def seconds(self) -> float:
        return self.prediction.iteration_s


@dataclass(frozen=True)
class Ranking:
    """Fastest candidates that fit in memory, one of each kind, best first.

    `tried` and `too_large` count candidates; `least` has the label and bytes of the smallest.
    """

    found: tuple[Found, ...]
    tried: int
    too_large: int
    least: tuple[str, float]

    @property
    def option(self) -> Option | None:
        """Return the fastest one; None if none fits."""
        return Option(self.found[0].label, self.found[0].prediction) if self.found else None


@dataclass(frozen=True)
class Results:
    """Rankings of FSEP and of stock, and the fastest stock under perfectly balanced counts.

    The latter fits in memory where one does.
    """

    best: Ranking
    stocks: Ranking
    balanced: Found

    @property
    def takes_fsep(self) -> bool:
        """Return True if FSEP's best is worth it at the cluster's constants."""
        ours, theirs = self.best.option, self.stocks.option
        if ours is None or theirs is None:
            return ours is not None
        return gain(ours.prediction, theirs.prediction).times >= WORTH

    def share(self, of: Found) -> float:
        """Return the share of perfectly balanced speed."""
        return self.balanced.seconds / of.seconds

    def verdict(self, most_gib: float) -> str:
        """Return the verdict with its reason, in one paragraph."""
        least_bytes = self.best.least, self.stocks.least
        return verdict(self.best.option, self.stocks.option, least_bytes, most_gib)


def search(predictor: Predictor, balanced: Predictor, progress: Progress) -> Results:
    """Search all settings of a run; `balanced` predicts it with perfectly balanced counts."""
    run = predictor.run
    settings = [
        setting
        for size in run.sizes
        if size > 1
        for geometry in geometries(run.model.num_experts, size, run.node_size, run.shardings)
        for setting in settings_of(
            geometry, run.dispatches, run.model.topk, run.flex_backend, run.overlaps
        )
    ]
    ours = [predictor.fsep(setting) for setting in settings]
    best = _rank(predictor, "FSEP", ours, progress, _SHOWN)
    stocks = _rank(predictor, "stock", predictor.stocks(), progress, _STOCKS)
    forced = _rank(balanced, "balanced", balanced.stocks(), progress, 1)
    if not forced.found:
        forced = _rank(balanced, "balanced", balanced.stocks(), progress, 1, math.inf)
    best, stocks = (_with_ranges(predictor, ranking, progress) for ranking in (best, stocks))
    return Results(best, stocks, forced.found[0])


def _rank(
    predictor: Predictor,
    title: str,
    candidates: Sequence[Candidate],
    progress: Progress,
    shown: int,
    most_bytes: float | None = None,
) -> Ranking:
    """Rank candidates, training's defaults first: roughly, and in full those close to the best."""
    limit = predictor.run.most_bytes if most_bytes is None else most_bytes
    fastest: dict[Hashable, tuple[float, Candidate]] = {}  # roughly, by shape
    least, too_large = ("", math.inf), 0
    for candidate in progress(f"{title}, roughly", candidates):
        needed = predictor.least_bytes(candidate)
        least = min(least, (candidate.label, needed), key=lambda of: of[1])
        if needed > limit:
            too_large += 1
            continue
        seconds = predictor.roughly(candidate)
        known = fastest.get(candidate.shape)
        if known is None or seconds * _EQUAL < known[0]:
            fastest[candidate.shape] = seconds, candidate
    order = sorted(fastest.values(), key=lambda of: of[0])
    found: dict[Hashable, Found] = {}
    tried = 0
    for seconds, candidate in progress(f"{title}, in full", order):
        is_close = seconds <= _CLOSE * order[0][0] and tried < _IN_FULL
        if not is_close and (candidate.kind in found or len(found) >= shown):
            continue
        prediction = predictor.fully(candidate, predictor.run.rates[:1])
        tried += 1
        known_kind = found.get(candidate.kind)
        if prediction.peak_bytes > limit:
            too_large += 1
        elif known_kind is None or prediction.iteration_s < known_kind.seconds:
            found[candidate.kind] = Found(candidate, prediction)
    ranked = sorted(found.values(), key=lambda each: each.seconds)[:shown]
    return Ranking(tuple(ranked), len(candidates), too_large, least)


def _with_ranges(predictor: Predictor, ranking: Ranking, progress: Progress) -> Ranking:
    found = [
        Found(each.candidate, predictor.fully(each.candidate, predictor.run.rates))
        for each in progress("ranges", ranking.found)
    ]
    return replace(ranking, found=tuple(found))
