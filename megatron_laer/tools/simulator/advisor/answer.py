"""Verdict of `advise`, and the constant that would change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_laer.tools.simulator.advisor.predictor import Predictor
from megatron_laer.tools.simulator.advisor.search import Found, Results
from megatron_laer.tools.simulator.iteration.rates import Rates, ends_of
from megatron_laer.tools.simulator.verdict import WORTH, Option, gain, verdict

# Loss that counts as another setting's being the better one.
_MATTERS = 1.01


@dataclass(frozen=True)
class Turn:
    """A constant at one end of its spread, and what is best there.

    `gain` is of the best setting over the best stock, `best` its label. `loss` is the time of the
    chosen setting over the best one's. With `reverses`, the other of FSEP and stock is worth it.
    """

    constant: str
    nominal: float
    value: float
    best: str
    gain: float
    loss: float
    reverses: bool

    @property
    def matters(self) -> bool:
        return self.reverses or self.loss > _MATTERS


def takes_fsep(results: Results) -> bool:
    """Return True if the best setting is worth it at the cluster's constants."""
    if not results.best or not results.stocks:
        return bool(results.best)
    return gain(results.best[0].prediction, results.stocks[0].prediction).times >= WORTH


def decisive_turn(predictor: Predictor, results: Results) -> Turn | None:
    """Predict the best with each constant at either end of its spread; return what matters most.

    None where FSEP or stock does not fit, or no constant has a spread.
    """
    if not results.best or not results.stocks:
        return None
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
                ours[0][place] / ours[best][place],
                (times >= WORTH) != is_worth,
            )
        )
    return max(made, key=lambda turn: (turn.reverses, turn.loss), default=None)


def _with(nominal: Rates, name: str, value: float) -> Rates:
    return replace(nominal, cluster=nominal.cluster.with_constants({name: value}))


def _scaled(predictor: Predictor, found: Found, sets: Sequence[Rates]) -> list[float]:
    """Return seconds by rates: in full at the nominal ones, changed as in a rough prediction."""
    rough_s = predictor.roughly(found.candidate, sets)
    return [found.seconds * float(seconds / rough_s[0]) for seconds in rough_s]


def verdict_of(results: Results, most_gib: float) -> str:
    """Return the verdict with its reason, in one paragraph."""
    ours, theirs = (
        Option(found[0].candidate.label, found[0].prediction) if found else None
        for found in (results.best, results.stocks)
    )
    return verdict(ours, theirs, results.least_bytes, most_gib)
