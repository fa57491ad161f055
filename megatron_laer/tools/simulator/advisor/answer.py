"""Verdict of `advise`, and the constant that would change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_laer.tools.simulator.advisor.predictor import Predictor
from megatron_laer.tools.simulator.advisor.search import Found, Results
from megatron_laer.tools.simulator.iteration.advice import WORTH, gain, losses, saved
from megatron_laer.tools.simulator.iteration.rates import Rates, ends_of

# Loss that counts as another setting's being the better one.
_MATTERS = 1.01


@dataclass(frozen=True)
class Turn:
    """A constant at one end of its spread, and what is best there.

    `gain` is of the best setting over the best stock, `best` its label, and `change` that gain over
    the nominal one. `loss` is the time of the chosen setting over the best one's. With `reverses`,
    the other of FSEP and stock is worth it.
    """

    constant: str
    nominal: float
    value: float
    best: str
    gain: float
    change: float
    loss: float
    reverses: bool

    @property
    def matters(self) -> bool:
        return self.reverses or self.loss > _MATTERS

    @property
    def weight(self) -> tuple[bool, bool, float]:
        size = max(self.loss, self.change, 1.0 / self.change)
        return self.reverses, self.loss > _MATTERS, size


def takes_fsep(results: Results) -> bool:
    """Return True if the best setting is worth it at the cluster's constants."""
    if not results.best or not results.stocks:
        return bool(results.best)
    return gain(results.best[0].prediction, results.stocks[0].prediction).times >= WORTH


def turns(predictor: Predictor, results: Results) -> list[Turn]:
    """Predict the best settings and stocks with each constant at either end of its spread."""
    if not results.best or not results.stocks:
        return []
    nominal = predictor.run.rates[0]
    ends = [
        (name, value)
        for name, of_constant in ends_of(nominal.cluster).items()
        for value in of_constant
        if value != nominal.cluster.constant(name)
    ]
    sets = [nominal, *(_with(nominal, name, value) for name, value in ends)]
    ours = [_scaled(predictor, found, sets) for found in results.best]
    stocks = [_scaled(predictor, found, sets) for found in results.stocks]
    is_worth = takes_fsep(results)
    now = results.stocks[0].seconds / min(found.seconds for found in results.best)
    made = []
    for place, (name, value) in enumerate(ends, start=1):
        best = min(range(len(ours)), key=lambda each: ours[each][place])
        times = min(of[place] for of in stocks) / ours[best][place]
        known = nominal.cluster.constant(name)
        assert known is not None
        made.append(
            Turn(
                name,
                known,
                value,
                results.best[best].candidate.label,
                times,
                times / now,
                ours[0][place] / ours[best][place],
                (times >= WORTH) != is_worth,
            )
        )
    return sorted(made, key=lambda turn: turn.weight, reverse=True)


def _with(nominal: Rates, name: str, value: float) -> Rates:
    return replace(nominal, cluster=nominal.cluster.with_constants({name: value}))


def _scaled(predictor: Predictor, found: Found, sets: Sequence[Rates]) -> list[float]:
    """Return seconds by rates: in full at the nominal ones, changed as in a rough prediction."""
    rough_s = predictor.roughly(found.candidate, sets)
    return [found.seconds * float(seconds / rough_s[0]) for seconds in rough_s]


def verdict(results: Results, most_gib: float) -> str:
    """Return the verdict with its reason, in one paragraph."""
    fits = f"{most_gib:.3g} GiB"
    if not results.best and not results.stocks:
        needs = " and ".join(f"{label} {size / 2**30:.3g}" for label, size in results.least_bytes)
        return (
            f"Nothing fits {fits} of a rank: the least need is of {needs} GiB. Recompute more, or "
            "spread the model over more pipeline stages, tensor-parallel ranks or GPUs."
        )
    if not results.best:
        label, size = results.least_bytes[0]
        return (
            f"Take {results.stocks[0].candidate.label}: no setting of FSEP fits {fits}; the least "
            f"need is of {label}, {size / 2**30:.3g} GiB."
        )
    ours = results.best[0]
    if not results.stocks:
        label, size = results.least_bytes[1]
        return (
            f"Use FSEP ({ours.candidate.label}): stock does not fit {fits}; the least need is of "
            f"{label}, {size / 2**30:.3g} GiB."
        )
    theirs = results.stocks[0]
    found = gain(ours.prediction, theirs.prediction)
    compared = f"it is {found} as fast as {theirs.candidate.label}"
    if found.times < WORTH:
        return (
            f"Take {theirs.candidate.label}, not FSEP: of its settings {ours.candidate.label} is "
            f"the fastest, and {compared}; {losses(ours.prediction, theirs.prediction)}."
        )
    sentence = (
        f"Use FSEP ({ours.candidate.label}): {compared}; "
        f"{saved(ours.prediction, theirs.prediction)}."
    )
    if found.low < WORTH:
        sentence += " At the worst constants it is not worth it, so measure them."
    return sentence
