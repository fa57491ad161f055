"""Predicted iterations as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_laer.planner.clusters import Cluster
from megatron_laer.tools.simulator.iteration.methods import FSDP_EP, FSEP, METHODS, STOCK
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction
from megatron_laer.tools.simulator.rendering import aligned
from megatron_laer.tools.simulator.verdict import Option, gain, verdict

_GIB = 2**30


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


Cases = Mapping[Case, Mapping[str, IterationPrediction]]
Refused = Mapping[Case, Mapping[str, str]]

LEGEND = """\
s/iteration at the cluster's constants, and from their fastest to their slowest. x stock: how many
times as fast as stock, with the same range; EP8: its fastest groups, of 8 ranks. MFU: FLOPs of the
model over the peak's. waiting: for ranks that compute longer; exposed: exchanges, counts and
bubbles that compute waits for; both are means over ranks. memory: with estimates for CUDA and NCCL,
without the allocator's loss."""


def not_given(cluster: Cluster) -> str:
    """Name constants without which a prediction leaves something out; "" if there are none."""
    lacks = []
    if cluster.card is None:
        lacks.append("no card, so only --memory-gib limits memory")
    if cluster.host is None:
        lacks.append("no host, so no layer waits for it")
    return f"{cluster.name} has {' and '.join(lacks)}." if lacks else ""


def table_text(methods: Mapping[str, IterationPrediction], refused: Mapping[str, str]) -> str:
    head = (
        *("method", "s/iteration", "low", "high", "x stock", "tokens/s", "MFU"),
        *("max/mean", "waiting", "exposed", "memory GiB"),
    )
    lines = [head]
    for found in methods.values():
        times = str(gain(found, methods[STOCK])) if STOCK in methods else "-"
        lines.append(
            (
                found.title,
                _s(found.iteration_s),
                _s(found.low_s),
                _s(found.high_s),
                times.replace(" times", ""),
                f"{found.tokens_per_s:,.0f}",
                f"{found.mfu:.1%}",
                f"{found.max_over_mean:.3f}",
                _s(found.waiting_s),
                _s(sum(found.exposed_s.values())),
                f"{found.peak_bytes / _GIB:.2f}",
            )
        )
    notes = [f"no {name}: {why}" for name, why in refused.items()]
    return "\n".join([aligned(lines), *notes])


def parts_text(methods: Mapping[str, IterationPrediction]) -> str:
    """Return seconds by kind and memory by part, with a column for each method."""
    first = next(iter(methods.values()))
    lines = [("", *(found.title for found in methods.values()))]
    by_kind = [(f"compute {kind} s", kind, True) for kind in first.compute_s]
    by_kind += [(f"exposed {kind} s", kind, False) for kind in first.exposed_s]
    for title, kind, is_compute in by_kind:
        seconds = [
            (found.compute_s if is_compute else found.exposed_s)[kind] for found in methods.values()
        ]
        if any(seconds):
            lines.append((title, *map(_s, seconds)))
    lines.append(("waiting s", *(_s(found.waiting_s) for found in methods.values())))
    parts = dict.fromkeys(part for found in methods.values() for part in found.memory_bytes)
    for part in parts:
        sizes = [found.memory_bytes.get(part, 0.0) / _GIB for found in methods.values()]
        lines.append((f"memory {part} GiB", *(f"{size:.2f}" for size in sizes)))
    return aligned(lines)


def sweep_text(cases: Cases) -> str:
    """Return the seconds of each method, with a line for each case."""
    names = [name for name in METHODS if any(name in methods for methods in cases.values())]
    lines: list[tuple[str, ...]] = [("s/iteration", *names)]
    for case, methods in cases.items():
        cells = [
            f"{_s(found.iteration_s)} ({_s(found.low_s)}-{_s(found.high_s)})"
            + ("" if found.group is None else f" EP{found.group}")
            if (found := methods.get(name)) is not None
            else "-"
            for name in names
        ]
        lines.append((case.among(cases), *cells))
    return aligned(lines)


def advice(cases: Cases, most_gib: float | None) -> str:
    """Return the verdict on the case in which FSEP has the most tokens per second and rank."""
    rivals = {
        case: methods.get(STOCK) or methods[FSDP_EP]
        for case, methods in cases.items()
        if FSEP in methods and (STOCK in methods or FSDP_EP in methods)
    }
    if not rivals:
        return "No advice: FSEP and stock EP were not both simulated."
    ours = {case: cases[case][FSEP] for case in rivals}
    fitting = [case for case in rivals if _fits(ours[case], most_gib)]
    least = min(rivals, key=lambda case: ours[case].peak_bytes)
    best = max(fitting, key=lambda of: ours[of].tokens_per_s / of.world, default=least)
    theirs = Option(_named(rivals[best]), rivals[best])
    least_bytes = [(least.label, ours[least].peak_bytes), (theirs.label, rivals[best].peak_bytes)]
    return verdict(
        Option(best.label, ours[best]) if fitting else None,
        theirs if _fits(rivals[best], most_gib) else None,
        least_bytes,
        most_gib,
    )


def _fits(prediction: IterationPrediction, most_gib: float | None) -> bool:
    return most_gib is None or prediction.peak_bytes <= most_gib * _GIB


def _named(rival: IterationPrediction) -> str:
    return "FSDP+EP" if rival.method == FSDP_EP else f"stock EP in groups of {rival.group}"


def content(about: Mapping[str, Any], cases: Cases, refused: Refused, advice: str) -> object:
    """Return the content of the JSON file: the first case by method, and all cases."""
    listed = [
        asdict(case)
        | {
            "methods": {name: _of_method(found) for name, found in methods.items()},
            "refused": dict(refused[case]),
        }
        for case, methods in cases.items()
    ]
    return {**about, "advice": advice, "methods": listed[0]["methods"], "cases": listed}


def _of_method(found: IterationPrediction) -> dict[str, Any]:
    shown = asdict(found)
    for name in ("method", "tokens", "flops", "peak_flops_per_s"):
        del shown[name]
    first: dict[str, Any] = {"iteration_s": found.range_s, "by_rates_s": found.by_rates_s}
    first |= {"tokens_per_s": found.tokens_per_s, "mfu": found.mfu}
    return first | shown | {"peak_bytes": found.peak_bytes}


def _s(seconds: float) -> str:
    return f"{seconds:.4g}"
