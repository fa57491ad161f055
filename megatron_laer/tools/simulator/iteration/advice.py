"""One sentence of advice: use FSEP, do not use it, or undecided by the constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_laer.tools.simulator.iteration.methods import FSDP_EP, FSEP, STOCK
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction

# Minimum gain: a smaller one is not worth another library, nor beyond the error of constants.
WORTH = 1.02


@dataclass(frozen=True)
class Case:
    """One combination of a sweep's values."""

    ranks: int
    node_size: int
    capacity: int
    sharding: str
    mode: str
    tokens: int
    world: int

    @property
    def label(self) -> str:
        return " ".join(self._parts())

    def among(self, cases: Iterable[Case]) -> str:
        """Return only the parts of the label in which these cases differ."""
        parts = zip(*(case._parts() for case in cases), strict=True)
        differs = [len(set(of_cases)) > 1 for of_cases in parts]
        return " ".join(part for part, shown in zip(self._parts(), differs, strict=True) if shown)

    def _parts(self) -> tuple[str, ...]:
        sizes = f"N={self.ranks}", f"G={self.node_size}", f"C={self.capacity}"
        return *sizes, self.sharding, self.mode, f"T={self.tokens}"


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


def advice(
    cases: Mapping[Case, Mapping[str, IterationPrediction]], most_bytes: float | None = None
) -> str:
    """Return one sentence on the case in which FSEP has the most tokens per second and rank."""
    rivals_of = {
        case: STOCK if STOCK in methods else FSDP_EP
        for case, methods in cases.items()
        if FSEP in methods and (STOCK in methods or FSDP_EP in methods)
    }
    if not rivals_of:
        return "No advice: FSEP and stock EP were not both simulated."
    needed = {case: cases[case][FSEP].peak_bytes for case in rivals_of}
    fits = [case for case in rivals_of if most_bytes is None or needed[case] <= most_bytes]
    if not fits:
        assert most_bytes is not None
        least = min(needed, key=lambda each: needed[each])
        return _too_large(needed[least], cases[least][rivals_of[least]], most_bytes)
    case = max(fits, key=lambda each: cases[each][FSEP].tokens_per_s / each.world)
    methods, rival = cases[case], rivals_of[case]
    found = gain(methods[FSEP], methods[rival])
    ours, theirs = methods[FSEP], methods[rival]
    named = _named(theirs)
    where = (
        f"with {case.label}"
        if len(cases) > 1
        else f"C = {case.capacity}, {case.sharding}, {case.mode}"
    )
    if most_bytes is not None and theirs.peak_bytes > most_bytes:
        return (
            f"Use FSEP ({where}): it needs {_gib(ours.peak_bytes)} of a rank's memory, and {named} "
            f"{_gib(theirs.peak_bytes)}, which does not fit {_gib(most_bytes)}."
        )
    if found.low >= WORTH:
        sentence = f"Use FSEP ({where}): it is {found} as fast as {named}"
        fitting = [of for of in methods.values() if not most_bytes or of.peak_bytes <= most_bytes]
        best = min(fitting, key=lambda each: each.iteration_s)
        if best.iteration_s * WORTH < ours.iteration_s:
            return f"{sentence}, but {best.method} takes {best.iteration_s:.3g} s for its " + (
                f"{ours.iteration_s:.3g}."
            )
        return f"{sentence}; {saved(ours, theirs)}."
    if found.high < WORTH:
        return (
            f"Do not use FSEP here ({where}): it is {found} as fast as {named}; "
            f"{losses(ours, theirs)}."
        )
    return (
        f"Undecided ({where}): FSEP is {found} as fast as {named}, so the constants of "
        "this cluster must be known better; measure them on its own machines."
    )


def _too_large(ours_bytes: float, theirs: IterationPrediction, most_bytes: float) -> str:
    """Return the advice where no case of FSEP fits, next to the rival in the smallest case."""
    fits = theirs.peak_bytes <= most_bytes
    verdict = "Do not use FSEP here: it does not fit" if fits else "Nothing fits"
    return (
        f"{verdict} {_gib(most_bytes)} of a rank's memory. FSEP needs {_gib(ours_bytes)}, "
        f"{_named(theirs)} {_gib(theirs.peak_bytes)}. Recompute more, or spread the model over "
        "more ranks or pipeline stages."
    )


def _named(rival: IterationPrediction) -> str:
    return "FSDP+EP" if rival.method == FSDP_EP else f"stock EP in groups of {rival.group}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
