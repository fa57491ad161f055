"""Statistics of layers and ranks, for the log line and for recordings of metrics.

`LayerPasses` adds up a layer's outcomes, one per decided pass. `LayerMetrics` and `RankMetrics` are
sums over groups and ranks, which `named` names as `metrics.py` says. Nothing here measures time.

Legend: N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.outcome import Outcome, Price
from megatron_laer.telemetry.metrics import LOGGED, PERCENTILES


@dataclass
class LayerPasses:
    """Sums over some passes of one layer; `metrics.RECORDED_OF_LAYERS` describes most fields.

    `gains_s` and `costs_s` are of passes that weighed a fresh layout, `taken_*` sums over those
    that took one. `replicas` are slots in use per rank, without each expert's first.
    """

    rank_tokens_N: Int64
    number: int = 0
    fresh: int = 0
    changed_slots: int = 0
    largest_tokens: int = 0
    least_tokens: int = 0
    ratios: list[float] = field(default_factory=list)
    stock_ratios: list[float] = field(default_factory=list)
    replicas: list[float] = field(default_factory=list)
    decide_s: list[float] = field(default_factory=list)
    gains_s: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)
    taken_cost_s: float = 0.0
    taken_decide_s: float = 0.0
    last: Outcome | None = None

    @classmethod
    def of(cls, num_ranks: int, outcomes: Iterable[Outcome] = ()) -> LayerPasses:
        passes = cls(np.zeros(num_ranks, dtype=np.int64))
        for outcome in outcomes:
            passes.add(outcome)
        return passes

    def add(self, outcome: Outcome) -> None:
        decision, tokens_N = outcome.decision, outcome.tokens_N
        self.last = outcome
        self.rank_tokens_N += tokens_N
        self.number += 1
        largest = int(tokens_N.max())
        if largest >= self.largest_tokens:
            self.largest_tokens = largest
            self.least_tokens = -(-int(tokens_N.sum()) // tokens_N.size)
        self.ratios.append(outcome.ratio)
        self.stock_ratios.append(outcome.stock_ratio)
        layout = decision.layout
        used = int(layout.replicas_E.sum()) - layout.num_experts
        self.replicas.append(used / layout.num_ranks)
        self.decide_s.append(outcome.decide_s)
        if decision.gain_s is not None and decision.cost_s is not None:
            self.gains_s.append(decision.gain_s)
            self.costs_s.append(decision.cost_s)
        if decision.replanned:
            self.fresh += 1
            self.changed_slots += decision.changed_slots
            self.taken_decide_s += outcome.decide_s
            self.taken_cost_s += math.nan if decision.cost_s is None else decision.cost_s

    def values(self) -> dict[str, float]:
        """Return the recorded values that follow from decisions alone, by name."""
        return {
            "passes": self.number,
            "fresh": self.fresh,
            "changed_slots": self.changed_slots,
            "largest_tokens": self.largest_tokens,
            "least_tokens": self.least_tokens,
            "max_over_mean": mean(self.ratios),
            "stock_max_over_mean": mean(self.stock_ratios),
            "gain_ms": mean(self.gains_s) * 1e3,
            "cost_ms": mean(self.costs_s) * 1e3,
            "replicas": mean(self.replicas),
            "without_replicas": self.replicas.count(0),
        }

    def host_values(self, changed_wait_s: float, exchanged_s: float) -> dict[str, float]:
        """Return the recorded values of measured times, by name.

        `exchanged_s` is all passes' time from dispatch to combine, in both directions.
        """
        change_s = changed_wait_s + self.taken_decide_s
        return {
            "decide_ms": mean(self.decide_s) * 1e3,
            "taken_cost_ms": self.taken_cost_s * 1e3 if self.fresh else math.nan,
            "change_ms": change_s * 1e3 if self.fresh else math.nan,
            "layer_ms": exchanged_s * 1e3 / self.number if self.number else math.nan,
        }


def priced_values(prices: Sequence[Price]) -> dict[str, float]:
    """Return the means of some passes' prices, by the names of recordings."""
    return {
        "predicted_ms": mean([of.layer_s for of in prices]) * 1e3,
        "stock_ms": mean([of.stock_s for of in prices]) * 1e3,
        "balanced_ms": mean([of.balanced_s for of in prices]) * 1e3,
        "bound_ms": mean([of.bound_s for of in prices]) * 1e3,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class LayerMetrics:
    """Sums over FSEP groups of their measurements of one layer.

    A layer's mean is the sum divided by `groups`. To add a metric of layers, add a field here, fill
    it in `of`, name it in `named`, and describe it in `metrics.py`.
    """

    imbalance: float = 0.0
    stock_imbalance: float = 0.0
    fresh_layouts: float = 0.0
    replicas: float = 0.0
    without_replicas: float = 0.0
    decide_ms: float = 0.0
    predicted_ms: float = 0.0
    balanced_ms: float = 0.0
    bound_ms: float = 0.0
    groups: float = 0.0

    @classmethod
    def of(cls, passes: LayerPasses, price: Price) -> LayerMetrics:
        """Return one group's metrics, from at least one pass and the price of the newest."""
        return cls(
            imbalance=mean(passes.ratios),
            stock_imbalance=mean(passes.stock_ratios),
            fresh_layouts=passes.fresh / passes.number,
            replicas=mean(passes.replicas),
            without_replicas=passes.replicas.count(0) / passes.number,
            decide_ms=mean(passes.decide_s) * 1e3,
            predicted_ms=price.layer_s * 1e3,
            balanced_ms=price.balanced_s * 1e3,
            bound_ms=price.bound_s * 1e3,
            groups=1.0,
        )

    def __add__(self, other: LayerMetrics) -> LayerMetrics:
        return LayerMetrics(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def mean(self) -> LayerMetrics:
        return LayerMetrics(*(value / self.groups for value in astuple(self)))


@dataclass(frozen=True)
class RankMetrics:
    """Sums over ranks of their measurements in a step; rows and bytes are sent ones.

    `ranks` counts those with MoE layers, `layer_ranks` those with a measured `layer_ms`.
    """

    restore_exposed_ms: float = 0.0
    reduce_exposed_ms: float = 0.0
    weight_bytes: float = 0.0
    ranks: float = 0.0
    intra_rows: float = 0.0
    inter_rows: float = 0.0
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    dispatches: float = 0.0
    layer_ms: float = 0.0
    layer_ranks: float = 0.0


def named(
    layers: Sequence[LayerMetrics], rank: RankMetrics
) -> tuple[dict[str, float], dict[str, float]]:
    """Name scalars and per-layer values as Megatron logs them, from a row per model layer."""
    means = {index: layer.mean() for index, layer in enumerate(layers) if layer.groups}
    scalars: dict[str, float] = {}
    per_layer: dict[str, float] = {}
    for metric in LOGGED:
        name = metric.name
        if metric.over:
            if count := getattr(rank, metric.over):
                value = getattr(rank, metric.of) / count
                scalars[name] = value / 1e6 if metric.unit == "MB" else value
        elif metric.of and means:
            by_layer = {at: getattr(layer, metric.of) for at, layer in means.items()}
            values = [*by_layer.values()]
            scalars[name] = mean(values)
            if metric.over_layers:
                per_layer |= {f"{name}_layer_{at}": value for at, value in by_layer.items()}
                scalars |= {f"{name}_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    if means:
        predicted_ms, bound_ms, balanced_ms = (
            sum(getattr(layer, of) for layer in means.values())
            for of in ("predicted_ms", "bound_ms", "balanced_ms")
        )
        # Without tokens, predictions are zero.
        scalars["fsep_optimality_gap"] = predicted_ms / bound_ms - 1 if bound_ms else 0.0
        scalars["fsep_share_of_forced_balance"] = (
            balanced_ms / predicted_ms if predicted_ms else 1.0
        )
    return scalars, per_layer
