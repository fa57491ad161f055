"""Predicted iterations as text, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_laer.planner.clusters import Cluster
from megatron_laer.tools.simulator.iteration.advice import Case, gain
from megatron_laer.tools.simulator.iteration.clocks import EXPOSED
from megatron_laer.tools.simulator.iteration.methods import METHODS, STOCK
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction
from megatron_laer.tools.simulator.node_rows import ASSUMED, CAUSES
from megatron_laer.tools.simulator.rendering import aligned, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    seconds = {"value": found.iteration_s, "low": found.low_s, "high": found.high_s}
    for name in ("method", "low_s", "high_s"):
        del shown[name]
    return shown | {
        "iteration_s": seconds,
        "bytes": found.bytes,
        "peak_bytes": found.peak_bytes,
    }


def draw(title: str, cases: Cases) -> Figure:
    """Draw one case as stacked seconds by kind, or several as throughput over the cases."""

    def draw_on(axes: Axes) -> None:
        if len(cases) == 1:
            _draw_parts(axes, next(iter(cases.values())))
        else:
            _draw_sweep(axes, cases)

    return plot(title, draw_on, (10, 4.5))


def _draw_parts(axes: Axes, methods: Mapping[str, IterationPrediction]) -> None:
    places = range(len(methods))
    starts = [0.0] * len(methods)
    parts = [
        (kind, [found.compute_s[kind] for found in methods.values()])
        for kind in next(iter(methods.values())).compute_s
    ]
    parts.append(("waiting", [found.waiting_s for found in methods.values()]))
    parts += [(kind, [found.exposed_s[kind] for found in methods.values()]) for kind in EXPOSED]
    for number, (kind, seconds) in enumerate(parts):
        if any(seconds):
            axes.barh(
                places,
                seconds,
                left=starts,
                label=kind,
                color=f"C{number % 10}",
                hatch="//" if kind in EXPOSED else None,
            )
        starts = [start + more for start, more in zip(starts, seconds, strict=True)]
    lows = [found.iteration_s - found.low_s for found in methods.values()]
    highs = [found.high_s - found.iteration_s for found in methods.values()]
    axes.errorbar(starts, places, xerr=(lows, highs), fmt="none", ecolor="black", capsize=4)
    axes.set_yticks(places, list(methods))
    axes.invert_yaxis()
    axes.set_xlabel("seconds per iteration, and their range over the constants")


def _draw_sweep(axes: Axes, cases: Cases) -> None:
    labels = [case.among(cases) for case in cases]
    for number, name in enumerate(METHODS):
        shown = [
            (place, case, methods[name])
            for place, (case, methods) in enumerate(cases.items())
            if name in methods
        ]
        if not shown:
            continue
        places = [place for place, _, _ in shown]
        # Throughput per rank, so that cases of different size can be compared.
        each = [found.tokens_per_s / case.world for _, case, found in shown]
        best, worst = (
            [
                rate * found.iteration_s / end
                for rate, (_, _, found), end in zip(each, shown, ends, strict=True)
            ]
            for ends in ([one.low_s for *_, one in shown], [one.high_s for *_, one in shown])
        )
        axes.plot(places, each, marker="o", color=f"C{number}", label=name)
        axes.fill_between(places, worst, best, color=f"C{number}", alpha=0.12)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize="small")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second and rank")


def _s(seconds: float) -> str:
    return f"{seconds:.4g}"
