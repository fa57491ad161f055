"""Search for the fastest settings of FSEP that fit in memory, and for the fastest stock.

All candidates are predicted roughly, and the best in full.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_laer.choices import Recompute
from megatron_laer.tools.simulator.advisor.predictor import Candidate, Predictor, Variant
from megatron_laer.tools.simulator.advisor.settings import geometries, settings_of
from megatron_laer.tools.simulator.output import WORTH, Option, gain, is_worth, verdict

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

    `fastest` is the first by time alone. `tried` counts candidates and `too_large` has those that
    do not fit; `least` has the label and bytes of the smallest.
    """

    found: tuple[Found, ...]
    fastest: Found | None
    tried: int
    too_large: tuple[Candidate, ...]
    least: tuple[str, float]

    @property
    def first(self) -> Found | None:
        return self.found[0] if self.found else None


@dataclass(frozen=True)
class Results:
    """Rankings of FSEP and of stock, and the fastest stock under perfectly balanced counts.

    The latter fits in memory where one does. `as_given` is the fastest stock by the given flags
    alone, `own_dispatcher` the one with assumed flags and the given dispatcher, `any_dispatcher`
    the one with any. Each is None if none fits. `can_recompute` is True if more can be recomputed.
    """

    best: Ranking
    stocks: Ranking
    balanced: Found
    as_given: Found | None
    own_dispatcher: Found | None
    any_dispatcher: Found | None
    can_recompute: bool

    @property
    def takes_fsep(self) -> bool:
        """Return True if FSEP's best is worth it; see `is_worth`."""
        ours, theirs = self.best.first, self.stocks.first
        return ours is not None and (theirs is None or is_worth(ours, theirs))

    def share(self, of: Found) -> float:
        """Return the share of perfectly balanced speed."""
        return self.balanced.seconds / of.seconds

    def verdict(self, most_gib: float) -> str:
        """Return the verdict with its reason, in one paragraph."""
        ours, fastest = self.best.first, self.best.fastest
        least_bytes = self.best.least, self.stocks.least
        sentence = verdict(
            ours, self.stocks.first, least_bytes, most_gib, can_recompute=self.can_recompute
        )
        sentence = " ".join(filter(None, [self._without_fsep(), sentence]))
        over = [
            of for of in self.best.found if of.leaves_nodes and ours and of.seconds < ours.seconds
        ]
        if over and ours and not ours.leaves_nodes:
            less = 1 - over[0].seconds / ours.seconds
            sentence += f" {over[0].label} takes {less:.1%} less time, but may lose over nodes."
        if ours is None or fastest is None or fastest.label == ours.label:
            return sentence
        more_gib = (fastest.prediction.peak_bytes - ours.prediction.peak_bytes) / 2**30
        return (
            f"{sentence} {fastest.label} takes {1 - fastest.seconds / ours.seconds:.1%} less time, "
            f"which constants leave open, and {more_gib:.1f} GiB more."
        )

    def _without_fsep(self) -> str:
        """Return the flags that gain without FSEP, with that gain, or ""."""
        given, assumed, best = self.as_given, self.own_dispatcher, self.any_dispatcher
        flags: list[str] = []
        known = () if given is None else given.candidate.variant.flags
        if best is not None and (given is None or assumed is None or _is_faster(assumed, given)):
            flags += [flag for flag in best.candidate.variant.flags if flag not in known]
        if best is not None and (assumed is None or _is_faster(best, assumed)):
            flags += ["--moe-token-dispatcher-type", best.candidate.dispatcher]
        if best is None or not flags:
            return ""
        words = shlex.join(flags)
        if given is None:
            return f"First add {words}: without that, no group of stock fits."
        times = gain(best.prediction, given.prediction)
        return f"First try {words}: {best.label} is then {times} as fast as {given.label}."


def _is_faster(one: Found, other: Found) -> bool:
    return gain(one.prediction, other.prediction).times >= WORTH


def search(predictor: Predictor, balanced: Predictor, progress: Progress) -> Results:
    """Search all settings of a run; `balanced` predicts it with perfectly balanced counts."""
    run, variants = predictor.run, predictor.run.variants
    own, every = (run.gives_flex,), (False, True)
    allowed = every if run.allows_flex else (False,)

    def ours(variant: Variant, *, over_nodes: bool) -> list[Candidate]:
        return [
            predictor.fsep(setting, variant)
            for size in run.sizes
            if size > 1 and (size > run.node_size) == over_nodes
            for geometry in geometries(run.model.num_experts, size, run.node_size, run.shardings)
            for setting in settings_of(
                geometry, run.dispatches, run.model.topk, run.flex_backend, variant.overlaps
            )
        ]

    def stocks(of: Predictor, flex: Sequence[bool], tried: Sequence[Variant]) -> Ranking:
        title = "stock" if of is predictor else "balanced"
        return _rank_variants(
            of, title, lambda variant: of.stocks(variant, flex), tried, progress, _STOCKS
        )

    near, far = (
        _rank_variants(
            predictor, title, partial(ours, over_nodes=over), variants, progress, _SHOWN, _ALIKE
        )
        for title, over in (("FSEP", False), ("FSEP over nodes", True))
    )
    theirs, given = stocks(predictor, allowed, variants), stocks(predictor, own, [run.as_given])
    assumed, best = (stocks(predictor, flex, variants) for flex in (own, every))
    forced = stocks(balanced, allowed, variants)
    if not forced.found:
        candidates = balanced.stocks(variants[-1], allowed)
        forced = _rank(balanced, "balanced", candidates, progress, 1, most_bytes=math.inf)

    near, far, theirs, given, assumed, best = (
        _with_ranges(predictor, ranking, progress)
        for ranking in (near, far, theirs, given, assumed, best)
    )
    return Results(
        _by_worth(near, far, theirs.first),
        theirs,
        forced.found[0],
        given.first,
        assumed.first,
        best.first,
        variants[-1].shape.recompute != Recompute.FULL,
    )


def _by_worth(near: Ranking, far: Ranking, stock: Found | None) -> Ranking:
    """Join rankings inside a node and over nodes; of the latter, what is not worth it is last."""
    worth = [of for of in far.found if stock is None or is_worth(of, stock)]
    kinds = {of.candidate.kind for of in (*near.found, *worth)}
    fastest = [of for of in (near.fastest, far.fastest) if of and of.candidate.kind in kinds]
    last = [of for of in far.found if of not in worth]
    joined = _joined([near, far], _SHOWN, _ALIKE)
    found = (*_in_order([*near.found, *worth], _ALIKE), *_in_order(last, _ALIKE))
    first = min(fastest, key=lambda of: of.seconds, default=joined.fastest)
    return replace(joined, found=found[:_SHOWN], fastest=first)


def _rank_variants(
    predictor: Predictor,
    title: str,
    of_variant: Callable[[Variant], list[Candidate]],
    variants: Sequence[Variant],
    progress: Progress,
    shown: int,
    alike: float = 1.0,
) -> Ranking:
    """Rank the candidates of the first variant, and those of others for what does not fit."""
    rankings: list[Ranking] = []
    for variant in variants:
        candidates = of_variant(variant)
        if rankings:
            missing = {of.layout for of in rankings[-1].too_large}
            candidates = [of for of in candidates if of.layout in missing]
            if not candidates:
                break
        rankings.append(_rank(predictor, title, candidates, progress, shown, alike=alike))
    return _joined(rankings, shown, alike)


def _joined(rankings: Sequence[Ranking], shown: int, alike: float) -> Ranking:
    return Ranking(
        _in_order([each for of in rankings for each in of.found], alike)[:shown],
        min(filter(None, (of.fastest for of in rankings)), key=lambda of: of.seconds, default=None),
        sum(of.tried for of in rankings),
        tuple(each for of in rankings for each in of.too_large),
        min((of.least for of in rankings), key=lambda of: of[1]),
    )


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
    least, too_large = ("", math.inf), list[Candidate]()
    for candidate in progress(f"{title}, roughly", candidates):
        needed = predictor.least_bytes(candidate)
        least = min(least, (candidate.label, needed), key=lambda of: of[1])
        if needed > limit:
            too_large.append(candidate)
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
            too_large.append(candidate)
        else:
            over = candidate.leaves_nodes
            found.append(Found(candidate.label, prediction, candidate, leaves_nodes=over))
            kinds.add(candidate.kind)
    return Ranking(
        _in_order(found, alike)[:shown],
        min(found, key=lambda of: of.seconds, default=None),
        len(candidates),
        tuple(too_large),
        least,
    )


def _in_order(found: Sequence[Found], alike: float) -> tuple[Found, ...]:
    """Return one of each kind, best first; of those that are alike the smallest."""
    first_s = min((of.seconds for of in found), default=math.inf)

    def place(of: Found) -> tuple[bool, float, float]:
        is_alike = of.seconds <= alike * first_s
        return not is_alike, of.prediction.peak_bytes if is_alike else of.seconds, of.seconds

    ranked: dict[Hashable, Found] = {}
    for of in sorted(found, key=place):
        ranked.setdefault(of.candidate.kind, of)
    return tuple(ranked.values())


def _with_ranges(predictor: Predictor, ranking: Ranking, progress: Progress) -> Ranking:
    found = [
        replace(each, prediction=predictor.predict(each.candidate, predictor.run.rates))
        for each in progress("ranges", ranking.found)
    ]
    return replace(ranking, found=tuple(found))
