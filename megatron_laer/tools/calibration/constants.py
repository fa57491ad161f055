"""Constants of a cluster and their spreads, computed from the measured figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from megatron_laer.planner.clusters import (
    ENOUGH_TOKENS,
    BackEnd,
    Cluster,
    Contention,
    Figure,
    HostTime,
    Link,
    SolveTime,
    Spread,
)
from megatron_laer.planner.gemm_curve import GemmCurve
from megatron_laer.tools.calibration.fitting import (
    fit_curve,
    fit_link,
    fit_solve,
    rates_of,
    rounded,
)
from megatron_laer.tools.calibration.quantities import (
    ALL_GATHER,
    ALONE,
    BESIDE,
    COPY,
    COUNTS,
    EXCHANGE,
    FORWARD,
    GATE,
    GEMM,
    INTER,
    INTRA,
    LAUNCH,
    PRODUCTS,
    SOLVE,
    AllToAll,
    PlannerCall,
    Product,
    Quantity,
    Single,
)
from megatron_laer.tools.calibration.settings import CalibrationSettings

# Back end whose GEMMs the cost model uses, unless a run names another.
DEFAULT_BACK_END = "loop"
# Launches that take the host as long as a forward's replicas do, by `benchmarks.host_path` with an
# estimate of driver and NCCL.
_REPLICAS_LAUNCHES = 150
_PERCENTILES = "measured: 10th to 90th percentile of"
_SIDES = ("median", "low", "high")
# Two processors of one memory slow each other up to three times; a card much less.
_USUAL = {
    "backward_gemm_factor": (0.6, 2.5),
    "contention.gemm": (1.0, 4.0),
    "contention.exchange": (1.0, 4.0),
}
# Factor between a point and its curve beyond which the point is named.
_MOST_OFF = 2.0
# Names of the figures that links and the planner's time are fitted to, as `quantities` writes them.
_ALL_TO_ALL = re.compile(r"All-to-All (\w+), peers (\d+), (\d+) bytes, s", re.ASCII)
_SOLVE = re.compile(rf"{SOLVE}, N (\d+), C (\d+), E (\d+), s", re.ASCII)

Figures = Mapping[Quantity, Figure]


def measured_cluster(
    figures: Figures,
    settings: CalibrationSettings,
    nodes: int,
    name: str,
    measured: Mapping[str, str],
) -> Cluster:
    """Make a cluster of all figures; `measured` describes hardware and software for readers."""
    back_ends = _back_ends(figures, settings)
    links, link_spreads = _links(figures)
    default = next(back_end for back_end in back_ends if back_end.name == DEFAULT_BACK_END)
    solve, solve_spread = _planner_time(figures, SOLVE)
    gate, gate_spread = _planner_time(figures, GATE)
    gate = SolveTime(rounded(gate.base_s + _beside_gather_s(figures)), gate.slot_s, gate.count_s)
    contention, contention_spreads = _contention(figures)
    ((copied, copy),) = _chosen(figures, Single, name=COPY)
    moved_bytes = 2 * copied.size  # read, and written
    memory = Figure(*(rounded(moved_bytes / s) for s in (copy.median, copy.high, copy.low)))
    launch = figures[Single(LAUNCH)]
    # On a CPU, launches are the compute.
    replicas_s = rounded(_REPLICAS_LAUNCHES * launch.median) if settings.device == "cuda" else 0.0
    assumed = [
        f"There were no {name}-node links, so they have the numbers of {other}-node links"
        for name, other in ((INTRA, INTER), (INTER, INTRA))
        if name not in links
    ]
    if replicas_s:
        assumed.append(f"Host time of replicas is that of {_REPLICAS_LAUNCHES} launches")
    return Cluster(
        name=name,
        source=f"Measured by `calibrate` on {measured['hardware']}; figures are below, and what "
        "they were measured with",
        assumed=". ".join(assumed) or "nothing",
        nodes=nodes,
        ranks_per_node=settings.node_size,
        gemm=default.forward,
        intra=links.get(INTRA) or links[INTER],
        inter=links.get(INTER) or links[INTRA],
        solve=solve,
        backward_gemm_factor=rounded(default.backward_gemm_factor),
        host=HostTime(launch.median, gate, replicas_s=replicas_s),
        contention=contention,
        memory_bytes_per_s=memory.median,
        back_ends=back_ends,
        spreads=(
            ("gemm", _gemm_spread(figures)),
            ("backward_gemm_factor", _backward_spread(default)),
            ("memory_bytes_per_s", Spread(memory.low, memory.high, f"{_PERCENTILES} copies")),
            ("solve", solve_spread),
            *link_spreads.items(),
            ("host.launch_s", Spread(launch.low, launch.high, f"{_PERCENTILES} samples")),
            ("host.gate", gate_spread),
            *contention_spreads,
        ),
        figures=tuple((str(key), figure) for key, figure in figures.items()),
        measured=tuple(measured.items()),
    )


def with_card(cluster: Cluster, memory_gib: float, like: Cluster) -> Cluster:
    """Add the rest of a GPU's card, from a shipped cluster of `like` cards."""
    assert like.card is not None
    said = f"The card but for its memory is that of {like.name}"
    return replace(
        cluster,
        assumed=said if cluster.assumed == "nothing" else f"{cluster.assumed}. {said}",
        card=replace(like.card, memory_gib=memory_gib),
    )


def implausible(cluster: Cluster) -> list[str]:
    """Return the constants outside of their usual range, as where other work disturbs ranks."""
    found = [(name, cluster.constant(name), *usual) for name, usual in _USUAL.items()]
    return [
        f"{name} {value:.3g} (usual are {low:g} to {high:g})"
        for name, value, low, high in found
        if value is not None and not low <= value <= high
    ]


def off_curve(cluster: Cluster) -> list[str]:
    """Return the measured points that are off their curve by more than a factor of 2.

    GEMMs have no formula: such a point is faster than both of its neighbours, or slower.
    """
    found = []
    for name, figure in cluster.figures:
        fitted_s = _fitted_s(cluster, name)
        times = None if fitted_s is None else figure.median / fitted_s
        if times is not None and not 1 / _MOST_OFF <= times <= _MOST_OFF:
            found.append(f"{name} {figure.median:.3g} ({times:.2g} times the fit's)")
    for back_end in cluster.back_ends:
        for product in PRODUCTS:
            points = getattr(back_end, product).points
            for (_, before), (tokens, speed), (_, after) in zip(
                points, points[1:], points[2:], strict=False
            ):
                low, high = sorted((before, after))
                if not low / _MOST_OFF <= speed <= high * _MOST_OFF:
                    point = str(Product(back_end.name, product, tokens)).removesuffix(", s")
                    found.append(
                        f"{point} {speed:.3g} FLOP/s (points next to it have {before:.3g} and "
                        f"{after:.3g})"
                    )
    return found


def _fitted_s(cluster: Cluster, name: str) -> float | None:
    """Return the seconds of a figure by its fit; None for a figure without one."""
    if match := _ALL_TO_ALL.fullmatch(name):
        link: Link = getattr(cluster, match[1])
        return link.latency_s + int(match[2]) * link.peer_s + int(match[3]) / link.bytes_per_s
    if match := _SOLVE.fullmatch(name):
        return cluster.solve.seconds(*map(int, match.groups()))
    return None


def _chosen[K: Quantity](
    figures: Figures, kind: type[K], **fields: object
) -> list[tuple[K, Figure]]:
    """Return the figures of one kind of quantity whose keys have these fields."""
    return [
        (key, figure)
        for key, figure in figures.items()
        if isinstance(key, kind) and fields.items() <= vars(key).items()
    ]


def _back_ends(figures: Figures, settings: CalibrationSettings) -> tuple[BackEnd, ...]:

    def curve(back_end: str, name: str) -> GemmCurve:
        of_product = _chosen(figures, Product, back_end=back_end, name=name)
        seconds = [(key.tokens, figure.median) for key, figure in of_product]
        return fit_curve(seconds, settings.expert.flops_per_token)

    return tuple(
        BackEnd(name, *(curve(name, product) for product in PRODUCTS))
        for name in dict.fromkeys(key.back_end for key, _ in _chosen(figures, Product))
    )


def _gemm_spread(figures: Figures) -> Spread:
    found = _chosen(figures, Product, back_end=DEFAULT_BACK_END, name=FORWARD)
    low = statistics.median(figure.median / figure.high for _, figure in found)
    high = statistics.median(figure.median / figure.low for _, figure in found)
    return _spread(1.0, (low, high), f"{_PERCENTILES} samples, median of the points")


def _backward_spread(back_end: BackEnd) -> Spread:
    factors = [
        forward / product.points[place][1]
        for place, (tokens, forward) in enumerate(back_end.forward.points)
        for product in (back_end.input_grad, back_end.weight_grad)
        if tokens >= min(ENOUGH_TOKENS, back_end.forward.points[-1][0])
    ]
    value = rounded(back_end.backward_gemm_factor)
    source = "measured: from the gradient and number of tokens with the least to that with the most"
    return _spread(value, factors, source)


def _links(figures: Figures) -> tuple[dict[str, Link], dict[str, Spread]]:
    """Return the measured classes of links and the spreads of all constants.

    A class that was not measured has the other's spreads.
    """
    links, spreads = {}, {}
    for name, other in ((INTRA, INTER), (INTER, INTRA)):
        if found := _chosen(figures, AllToAll, link=name):
            links[name], of_link = _link(found)
            for constant, spread in of_link.items():
                spreads[f"{name}.{constant}"] = spread
                spreads.setdefault(f"{other}.{constant}", spread)
    return links, spreads


def _link(found: Sequence[tuple[AllToAll, Figure]]) -> tuple[Link, dict[str, Spread]]:
    by_side = {
        side: [(key.peers, key.sent_bytes, getattr(figure, side)) for key, figure in found]
        for side in _SIDES
    }
    link = fit_link(by_side["median"])
    rates = [statistics.median(rates_of(link, exchanges)) for exchanges in by_side.values()]
    # The time of the smallest message is latency alone.
    smallest = min(found, key=lambda item: (item[0].sent_bytes, item[0].peers))[1]
    return link, {
        "bytes_per_s": _spread(
            link.bytes_per_s, rates, f"{_PERCENTILES} samples, median of the large messages"
        ),
        "latency_s": _spread(
            link.latency_s,
            (smallest.low, smallest.high),
            f"{_PERCENTILES} samples of the smallest message; the constant is the fit's",
        ),
    }


def _planner_time(figures: Figures, name: str) -> tuple[SolveTime, Spread]:
    found = _chosen(figures, PlannerCall, name=name)
    calls = [((key.ranks, key.capacity, key.experts), figure.median) for key, figure in found]
    fit = fit_solve(calls)
    ratios = [
        seconds / fit.seconds(key.ranks, key.capacity, key.experts)
        for key, figure in found
        for seconds in (figure.low, figure.high)
    ]
    return fit, _spread(1.0, ratios, f"{_PERCENTILES} samples of all shapes, over the fit")


def _beside_gather_s(figures: Figures) -> float:
    ((_, exchange),) = _chosen(figures, Single, name=COUNTS)
    ((_, gather),) = _chosen(figures, Single, name=ALL_GATHER)
    return max(0.0, exchange.median - gather.median)


def _contention(figures: Figures) -> tuple[Contention, list[tuple[str, Spread]]]:
    factors = {}
    for name in (GEMM, EXCHANGE):
        alone_s = figures[Single(ALONE.format(name))].median
        beside = figures[Single(BESIDE.format(name))]
        factors[name] = Figure(
            *(rounded(s / alone_s) for s in (beside.median, beside.low, beside.high))
        )
    source = f"{_PERCENTILES} samples beside the other, over the median alone"
    return Contention(factors[GEMM].median, factors[EXCHANGE].median), [
        ("contention.gemm", Spread(factors[GEMM].low, factors[GEMM].high, source)),
        ("contention.exchange", Spread(factors[EXCHANGE].low, factors[EXCHANGE].high, source)),
    ]


def _spread(value: float, others: Iterable[float], source: str) -> Spread:
    rounded_others = [rounded(other) for other in others]
    return Spread(min(value, *rounded_others), max(value, *rounded_others), source)
