"""Search for the fastest settings of FSEP that fit in memory, and for the fastest stock.

All candidates are predicted roughly, and the best in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_laer.tools.simulator.advisor.predictor import Candidate, Predictor
from megatron_laer.tools.simulator.advisor.settings import geometries, settings_of
from megatron_laer.tools.simulator.output import WORTH, Option, gain, verdict

# Settings of FSEP and groups of stock that are shown, and shapes of which close ones are predicted
# in full.
_SHOWN, _STOCKS, _IN_FULL = 5, 2, 10
# Rough times up to this factor of the best's may be the best in full.
_CLOSE = 1.05
# Rough times up to this factor count as equal, and the one nearer to training's defaults wins.
_EQUAL = 1.002
# Times up to this factor of the best's are less apart than constants are known, and the setting
# that leaves the most memory free is the first.
_ALIKE = 1.01

# Wraps items that are worked on, under a title.
Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Found(Option):
    """Prediction of a candidate."""

    candidate: Candidate

    @property
    def seconds(self) -> float:
        return self.prediction.iteration_s


@dataclass(frozen=True)
class Ranking:
    """Candidates that fit in memory, one of each kind, best first.

    `fastest` is the first by time alone. `tried` and `too_large` count candidates; `least` has the
    label and bytes of the smallest.
    """

    found: tuple[Found, ...]
    fastest: Found | None
    tried: int
    too_large: int
    least: tuple[str, float]

    @property
    def first(self) -> Found | None:
        return self.found[0] if self.found else None


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
        ours, theirs = self.best.first, self.stocks.first
        if ours is None or theirs is None:
            return ours is not None
        return gain(ours.prediction, theirs.prediction).times >= WORTH

    def share(self, of: Found) -> float:
        """Return the share of perfectly balanced speed."""
        return self.balanced.seconds / of.seconds

    def verdict(self, most_gib: float) -> str:
        """Return the verdict with its reason, in one paragraph."""
        ours, fastest = self.best.first, self.best.fastest
        least_bytes = self.best.least, self.stocks.least
        sentence = verdict(ours, self.stocks.first, least_bytes, most_gib)
        if ours is None or fastest is None or fastest.label == ours.label:
            return sentence
        more_gib = (fastest.prediction.peak_bytes - ours.prediction.peak_bytes) / 2**30
        return (
            f"{sentence} {fastest.label} takes {1 - fastest.seconds / ours.seconds:.1%} less time, "
            f"which constants leave open, and {more_gib:.1f} GiB more."
        )


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
    best = _rank(predictor, "FSEP", ours, progress, _SHOWN, alike=_ALIKE)
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
    alike: float = 1.0,
) -> Ranking:
    """Rank candidates, training's defaults first: roughly, and in full those close to the best.

    Of those within the factor `alike` of the fastest, the smallest is the first.
    """
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
    found: list[Found] = []
    kinds: set[Hashable] = set()
    tried = 0
    for seconds, candidate in progress(f"{title}, in full", order):
        is_close = seconds <= _CLOSE * order[0][0] and tried < _IN_FULL
        if not is_close and (candidate.kind in kinds or len(kinds) >= shown):
            continue
        prediction = predictor.predict(candidate, predictor.run.rates[:1])
        tried += 1
        if prediction.peak_bytes > limit:
            too_large += 1
        else:
            found.append(Found(candidate.label, prediction, candidate))
            kinds.add(candidate.kind)
    first = min(found, key=lambda of: of.seconds, default=None)

    def place(of: Found) -> tuple[bool, float, float]:
        assert first is not None
        is_alike = of.seconds <= alike * first.seconds
        return not is_alike, of.prediction.peak_bytes if is_alike else of.seconds, of.seconds

    ranked: dict[Hashable, Found] = {}
    for of in sorted(found, key=place):
        ranked.setdefault(of.candidate.kind, of)
    return Ranking(tuple(ranked.values())[:shown], first, len(candidates), too_large, least)


def _with_ranges(predictor: Predictor, ranking: Ranking, progress: Progress) -> Ranking:
    found = [
        replace(each, prediction=predictor.predict(each.candidate, predictor.run.rates))
        for each in progress("ranges", ranking.found)
    ]
    return replace(ranking, found=tuple(found))
