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
        return (
            f"Do not use FSEP here: it needs {min(needed.values()) / 2**30:.3g} GiB of a rank's "
            "memory; recompute more, or spread the model over more ranks or pipeline stages."
        )
    case = max(fits, key=lambda each: cases[each][FSEP].tokens_per_s / each.world)
    methods, rival = cases[case], rivals_of[case]
    found = gain(methods[FSEP], methods[rival])
    ours, theirs = methods[FSEP], methods[rival]
    named = "FSDP+EP" if rival == FSDP_EP else f"stock EP in groups of {theirs.group}"
    where = (
        f"with {case.label}"
        if len(cases) > 1
        else f"C = {case.capacity}, {case.sharding}, {case.mode}"
    )
    if most_bytes is not None and theirs.peak_bytes > most_bytes:
        return (
            f"Use FSEP ({where}) if at all: {named} needs {theirs.peak_bytes / 2**30:.3g} GiB of a "
            f"rank's memory, FSEP {ours.peak_bytes / 2**30:.3g}."
        )
    if found.low >= WORTH:
        sentence = f"Use FSEP ({where}): it is {found} as fast as {named}"
        best = min(methods.values(), key=lambda each: each.iteration_s)
        if best.iteration_s * WORTH < ours.iteration_s:
            return f"{sentence}, but {best.method} takes {best.iteration_s:.3g} s for its " + (
                f"{ours.iteration_s:.3g}."
            )
        saved_s = theirs.waiting_s - ours.waiting_s
        return f"{sentence}, since ranks wait {saved_s:.3g} s less for the slowest one."
    if found.high < WORTH:
        return (
            f"Do not use FSEP here ({where}): it is {found} as fast as {named}; "
            f"{losses(ours, theirs)}."
        )
    return (
        f"Undecided ({where}): FSEP is {found} as fast as {named}, so the constants of "
        "this cluster must be known better; measure them on its own machines."
    )
