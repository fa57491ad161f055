"""Predicted iterations as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_laer.planner.clusters import Cluster
from megatron_laer.tools.simulator.iteration.advice import Case, gain
from megatron_laer.tools.simulator.iteration.methods import METHODS, STOCK
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction
from megatron_laer.tools.simulator.node_rows import ASSUMED, CAUSES
from megatron_laer.tools.simulator.rendering import aligned

_GIB = 2**30
Cases = Mapping[Case, Mapping[str, IterationPrediction]]
Refused = Mapping[Case, Mapping[str, str]]

LEGEND = (
    """\
s/iteration at the cluster's constants, and from their fastest to their slowest. x stock: how many
times as fast as stock, with the same range; EP8: its fastest groups, of 8 ranks. MFU: FLOPs of the
model over the peak's. waiting: for ranks that compute longer; exposed: exchanges, counts and
bubbles that compute waits for; both are means over ranks. received: by a rank in an iteration.
memory: with estimates for CUDA and NCCL, without the allocator's loss.
"""
    + ASSUMED
)


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
        *("max/mean", "waiting", "exposed", "received GB in/between nodes", "memory GiB"),
    )
    lines = [head]
    for found in methods.values():
        times = str(gain(found, methods[STOCK])) if STOCK in methods else "-"
        received = found.bytes
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
                f"{received['intra'] / 1e9:.2f} / {received['inter'] / 1e9:.2f}",
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
    if first.node_rows["home"]:
        for cause in CAUSES:
            shares = [f"{found.node_rows[cause]:.1%}" for found in methods.values()]
            lines.append((f"rows between nodes {cause}", *shares))
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
    seconds = {"value": found.iteration_s, "low": found.low_s, "high": found.high_s}
    first: dict[str, Any] = {"iteration_s": seconds, "by_rates_s": found.by_rates_s}
    first |= {"tokens_per_s": found.tokens_per_s, "mfu": found.mfu}
    return first | shown | {"bytes": found.bytes, "peak_bytes": found.peak_bytes}


def _s(seconds: float) -> str:
    return f"{seconds:.4g}"
