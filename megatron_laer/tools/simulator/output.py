"""Predictions as tables, verdicts and JSON, for `plan`, `simulate` and `advise`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_laer.choices import Dispatch, Restore
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.iteration.methods import FSEP, STOCK
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction

# Minimum gain: a smaller one is not worth another library, nor beyond the error of constants.
WORTH = 1.02
# Said where the range of constants has the other answer too.
_MEASURE = " At the {} constants it is {}worth it, so measure them."

_GIB, _WIDTH = 2**30, 100

LEGEND = """\
s/iteration at the cluster's constants, and from their fastest to their slowest. x stock: how many
times as fast as stock, with the same range; EP8 (flex): its fastest groups, of 8 ranks, and its
fastest dispatcher. MFU: FLOPs of the model over the peak's. waiting: for ranks that compute longer;
exposed: exchanges, counts and bubbles that compute waits for; both are means over ranks. memory:
with estimates for CUDA and NCCL, without the allocator's loss."""


def filled(words: str) -> str:
    """Wrap a paragraph; a word that is longer than a line, such as a path, stays whole."""
    return textwrap.fill(words, _WIDTH, break_on_hyphens=False, break_long_words=False)


def setting_label(
    geometry: Geometry, tokens: Dispatch, restore: Restore | float, *, combined: bool
) -> str:
    """Name a setting of FSEP, as `simulate` and `advise` do."""
    sizes = f"EP{geometry.num_ranks} {geometry.sharding} C={geometry.capacity}"
    words = [sizes, f"tokens {tokens}", f"restore {restore}"]
    return ", ".join([*words, *["overlap"] * combined])


def table[T](
    columns: Mapping[str, Callable[[T], str]], rows: Iterable[T], left: Collection[int] = (0,)
) -> str:
    """Return a table with a line for each row, and columns aligned as by `aligned`."""
    return aligned([[*columns], *([cell(of) for cell in columns.values()] for of in rows)], left)


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a table as text, with the columns of `left` left-aligned, others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def not_given(cluster: Cluster) -> str:
    """Name constants without which a prediction leaves something out; "" if there are none."""
    lacks = []
    if cluster.card is None:
        lacks.append("no card, so only --memory-gib limits memory")
    if cluster.host is None:
        lacks.append("no host, so no layer waits for it")
    return f"{cluster.name} has {' and '.join(lacks)}." if lacks else ""


@dataclass(frozen=True)
class Option:
    """A way to train, and its predicted iteration."""

    label: str
    prediction: IterationPrediction
    leaves_nodes: bool = field(default=False, kw_only=True)


def columns(stock: IterationPrediction | None) -> dict[str, Callable[[Option], str]]:
    """Return the columns that tables of predictions share, with the speed over this stock's."""

    def over_stock(of: Option) -> str:
        # A prediction at the nominal constants alone has no range.
        if stock is None or len(of.prediction.by_rates_s) < len(stock.by_rates_s):
            return "-"
        return str(gain(of.prediction, stock)).replace(" times", "")

    return {
        "s/iteration": lambda of: _s(of.prediction.iteration_s),
        "low": lambda of: _s(of.prediction.low_s),
        "high": lambda of: _s(of.prediction.high_s),
        "x stock": over_stock,
        "max/mean": lambda of: f"{of.prediction.max_over_mean:.3f}",
        "memory GiB": lambda of: f"{of.prediction.peak_bytes / _GIB:.2f}",
    }


def methods_text(methods: Mapping[str, IterationPrediction]) -> str:
    shown: dict[str, Callable[[Option], str]] = {
        "method": lambda of: of.label,
        **columns(methods.get(STOCK)),
        "tokens/s": lambda of: f"{of.prediction.tokens_per_s:,.0f}",
        "MFU": lambda of: f"{of.prediction.mfu:.1%}",
    }
    return table(shown, [Option(found.title, found) for found in methods.values()])


def parts_text(methods: Mapping[str, IterationPrediction]) -> str:
    """Return seconds by kind and memory by part, with a column for each method."""
    found = list(methods.values())
    lines = [("", *(of.title for of in found))]
    for kind in found[0].compute_s:
        lines.append((f"compute {kind} s", *(_s(of.compute_s[kind]) for of in found)))
    for kind in found[0].exposed_s:
        if any(of.exposed_s[kind] for of in found):
            lines.append((f"exposed {kind} s", *(_s(of.exposed_s[kind]) for of in found)))
    lines.append(("waiting s", *(_s(of.waiting_s) for of in found)))
    for part in dict.fromkeys(part for of in found for part in of.memory_bytes):
        sizes = (of.memory_bytes.get(part, 0.0) / _GIB for of in found)
        lines.append((f"memory {part} GiB", *(f"{size:.2f}" for size in sizes)))
    return aligned(lines)


def advice(
    label: str,
    methods: Mapping[str, IterationPrediction],
    most_gib: float | None,
    *,
    leaves_nodes: bool,
    can_recompute: bool,
) -> str:
    """Return the verdict on FSEP, whose settings the label names."""
    ours, stock = methods.get(FSEP), methods.get(STOCK)
    if ours is None or stock is None:
        return "No advice: FSEP and stock EP were not both simulated."
    both = Option(label, ours, leaves_nodes=leaves_nodes), Option(stock.title, stock)
    least_bytes = [(of.label, of.prediction.peak_bytes) for of in both]
    most_bytes = math.inf if most_gib is None else most_gib * _GIB
    mine, theirs = (of if of.prediction.peak_bytes <= most_bytes else None for of in both)
    return verdict(mine, theirs, least_bytes, most_gib, can_recompute=can_recompute)


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


def is_worth(ours: Option, theirs: Option) -> bool:
    """Return True if FSEP gains enough: over nodes, whose links vary most, in its worst case."""
    found = gain(ours.prediction, theirs.prediction)
    return (found.low if ours.leaves_nodes else found.times) >= WORTH


def _reason(ours: IterationPrediction, theirs: IterationPrediction, *, gains: bool) -> str:
    """Return the part of an iteration that shrinks most with FSEP, or that grows most."""
    less = {"the slowest rank": theirs.waiting_s - ours.waiting_s}
    less |= {kind: theirs.exposed_s[kind] - seconds for kind, seconds in ours.exposed_s.items()}
    kind = (max if gains else min)(less, key=lambda kind: less[kind])
    return f"waiting for {kind} takes {abs(less[kind]):.3g} s {'less' if gains else 'more'}"


def verdict(
    ours: Option | None,
    theirs: Option | None,
    least_bytes: Sequence[tuple[str, float]],
    most_gib: float | None,
    *,
    can_recompute: bool,
) -> str:
    """Compare the best of FSEP with the best of stock; None does not fit in memory.

    `least_bytes` name FSEP's and stock's ways that need the least memory.
    """
    limit = "" if most_gib is None else f"{most_gib:.3g} GiB"
    needs = [(label, f"{size / 2**30:.3g}") for label, size in least_bytes]
    if ours is None and theirs is None:
        of_both = " and ".join(f"{label} {size}" for label, size in needs)
        way_out = "Recompute more, or spread" if can_recompute else "Spread"
        return (
            f"Nothing fits {limit} of a rank: the least need is of {of_both} GiB. {way_out} the "
            "model over more pipeline stages, tensor-parallel ranks or GPUs."
        )
    if ours is None or theirs is None:
        label, size = needs[ours is not None]
        need = f"{limit}; the least need is of {label}, {size} GiB."
        if theirs is not None:
            return f"Take {theirs.label}: no setting of FSEP fits {need}"
        assert ours is not None
        return f"Use FSEP ({ours.label}): stock does not fit {need}"
    found, gains = gain(ours.prediction, theirs.prediction), is_worth(ours, theirs)
    reason = _reason(ours.prediction, theirs.prediction, gains=gains)
    compared = f"it is {found} as fast as {theirs.label}; {reason}."
    if not gains and found.times >= WORTH:
        compared = f"it is {found} as fast as {theirs.label}; over nodes the worst case must gain."
    if gains:
        more = "" if found.low >= WORTH else _MEASURE.format("worst", "not ")
        return f"Use FSEP ({ours.label}): {compared}{more}"
    more = "" if found.high < WORTH else _MEASURE.format("best", "")
    fastest = f"of its settings {ours.label} is the best, and {compared}{more}"
    return f"Take {theirs.label}, not FSEP: {fastest}"


def content(found: IterationPrediction) -> dict[str, Any]:
    """Return a prediction as in JSON files."""
    shown = asdict(found)
    for name in ("method", "tokens", "flops", "peak_flops_per_s"):
        del shown[name]
    seconds = {"value": found.iteration_s, "low": found.low_s, "high": found.high_s}
    first = {"iteration_s": seconds, "tokens_per_s": found.tokens_per_s, "mfu": found.mfu}
    return first | shown | {"peak_bytes": found.peak_bytes}


def _s(seconds: float) -> str:
    return f"{seconds:.4g}"
