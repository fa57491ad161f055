"""Verdict of `simulate` and `advise`: use FSEP, or take stock, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_laer.tools.simulator.iteration.predict import IterationPrediction

# Minimum gain: a smaller one is not worth another library, nor beyond the error of constants.
WORTH = 1.02


class Option(NamedTuple):
    """A way to train, and its predicted iteration."""

    label: str
    prediction: IterationPrediction


@dataclass(frozen=True)
class Gain:
    """Speed of one method over another's, with its range over the rates."""

    times: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.times:.2f} times ({self.low:.2f} to {self.high:.2f})"


def gain(method: IterationPrediction, over: IterationPrediction) -> Gain:
    """Compare two methods at each set of rates, since both run on the same machine."""
    ratios = [
        theirs / ours for ours, theirs in zip(method.by_rates_s, over.by_rates_s, strict=True)
    ]
    return Gain(ratios[0], min(ratios), max(ratios))


def losses(ours: IterationPrediction, theirs: IterationPrediction) -> str:
    """Return the seconds that balance saves, and those that the dearest exchange adds."""
    more = {kind: seconds - theirs.exposed_s[kind] for kind, seconds in ours.exposed_s.items()}
    worst = max(more, key=lambda kind: more[kind])
    saved_s = theirs.waiting_s - ours.waiting_s
    return (
        f"balance saves {max(saved_s, 0.0):.3g} s of {theirs.iteration_s:.3g}, and {worst} costs "
        f"{max(more[worst], 0.0):.3g} s more"
    )


def saved(ours: IterationPrediction, theirs: IterationPrediction) -> str:
    """Return the part of an iteration that shrinks most."""
    waits = "waiting for the slowest rank"
    less = {waits: theirs.waiting_s - ours.waiting_s}
    less |= {kind: theirs.exposed_s[kind] - seconds for kind, seconds in ours.exposed_s.items()}
    most = max(less, key=lambda kind: less[kind])
    return f"{most} takes {less[most]:.3g} s less"


def verdict(
    ours: Option | None,
    theirs: Option | None,
    least_bytes: Sequence[tuple[str, float]],
    most_gib: float | None,
) -> str:
    """Compare the best of FSEP with the best of stock; None does not fit in memory.

    `least_bytes` name FSEP's and stock's ways that need the least memory.
    """
    limit = "" if most_gib is None else f"{most_gib:.3g} GiB"
    needs = [(label, f"{size / 2**30:.3g}") for label, size in least_bytes]
    if ours is None and theirs is None:
        of_both = " and ".join(f"{label} {size}" for label, size in needs)
        return (
            f"Nothing fits {limit} of a rank: the least need is of {of_both} GiB. Recompute more, "
            "or spread the model over more pipeline stages, tensor-parallel ranks or GPUs."
        )
    if ours is None or theirs is None:
        label, size = needs[ours is not None]
        need = f"{limit}; the least need is of {label}, {size} GiB."
        if theirs is not None:
            return f"Take {theirs.label}: no setting of FSEP fits {need}"
        assert ours is not None
        return f"Use FSEP ({ours.label}): stock does not fit {need}"
    found = gain(ours.prediction, theirs.prediction)
    compared = f"it is {found} as fast as {theirs.label}"
    if found.times < WORTH:
        return (
            f"Take {theirs.label}, not FSEP: of its settings {ours.label} is the fastest, and "
            f"{compared}; {losses(ours.prediction, theirs.prediction)}."
        )
    reason = saved(ours.prediction, theirs.prediction)
    sentence = f"Use FSEP ({ours.label}): {compared}; {reason}."
    if found.low < WORTH:
        sentence += " At the worst constants it is not worth it, so measure them."
    return sentence
