"""Prediction of each method's iterations on a trace, as a range over the rates.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from megatron_laer.precision import Precision
from megatron_laer.tools.simulator.iteration.clocks import COMPUTE, EXPOSED, WAITING
from megatron_laer.tools.simulator.iteration.iterate import Iteration, run_iteration
from megatron_laer.tools.simulator.iteration.layer_times import Timing
from megatron_laer.tools.simulator.iteration.link_bytes import link_bytes, totals
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import LayerWork
from megatron_laer.tools.simulator.node_rows import NodeRows, by_cause

# A token's FLOPs in forward and backward, over those of forward. Frozen weights have no gradients.
_TRAINING_PASSES, _FROZEN_PASSES = 3, 2


@dataclass(frozen=True)
class IterationPrediction:
    """Predicted iteration of a method; means over steps, and over ranks unless stated.

    `by_rates_s` has the time for each set of rates, nominal first. `tokens` are of all ranks, and
    `flops` of a rank, without recompute. `compute_s` and `exposed_s`, by kind, and `waiting_s` for
    slower ranks add up to `iteration_s`. `bytes_by_kind` are received, by link class and kind.
    `memory_bytes` are of the rank and stage that need most. `replan_share` is of microbatches that
    fetched slots after the gate; 0 in mode `exact`. `node_rows` are between nodes per pair, by
    cause. `group` is stock's.
    """

    method: str
    by_rates_s: tuple[float, ...]
    tokens: float
    flops: float
    peak_flops_per_s: float
    compute_s: Mapping[str, float]
    exposed_s: Mapping[str, float]
    waiting_s: float
    bytes_by_kind: Mapping[str, Mapping[str, float]]
    memory_bytes: Mapping[str, float]
    max_over_mean: float
    replan_share: float
    node_rows: Mapping[str, float]
    group: int | None = None

    @property
    def iteration_s(self) -> float:
        return self.by_rates_s[0]

    @property
    def low_s(self) -> float:
        return min(self.by_rates_s)

    @property
    def high_s(self) -> float:
        return max(self.by_rates_s)

    @property
    def range_s(self) -> dict[str, float]:
        """Return the iteration's time and its ends, as in JSON."""
        return {"value": self.iteration_s, "low": self.low_s, "high": self.high_s}

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.iteration_s

    @property
    def mfu(self) -> float:
        return self.flops / (self.iteration_s * self.peak_flops_per_s)

    @property
    def title(self) -> str:
        return self.method if self.group is None else f"{self.method} EP{self.group}"

    @property
    def bytes(self) -> dict[str, float]:
        return totals(self.bytes_by_kind)

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory_bytes.values())


class Place(NamedTuple):
    """Recorded layer whose routing a layer has, and its precision."""

    recorded: int
    precision: Precision


@dataclass(frozen=True)
class StepWorks:
    """Outcomes of one step as work of each microbatch, by method and place.

    `places` are the model's layers; None has no experts.
    """

    places: Sequence[Place | None]
    of: Mapping[str, Mapping[Place, Sequence[LayerWork]]]

    def at(self, method: str, layer: int, microbatch: int) -> LayerWork | None:
        place = self.places[layer]
        if place is None:
            return None
        works = self.of[method][place]
        return works[microbatch % len(works)]


@dataclass
class _Collected:
    iterations: list[list[Iteration]] = field(default_factory=list)  # by step, by rates
    bytes_by_kind: list[dict[str, dict[str, float]]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    replans: list[bool] = field(default_factory=list)
    node_rows: list[NodeRows] = field(default_factory=list)
    most_pairs: int = 0


def predict_iterations(
    routing: Routing,
    model: ModelShape,
    run: RunShape,
    methods: Sequence[Method],
    rate_sets: Sequence[Rates],
    *,
    steps: int = 1,
    lag: int = 1,
    peak_flops_per_s: float | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[IterationPrediction]:
    """Replay steps of a trace, and price iterations of all methods with their work."""
    sizes = run.microbatches, steps, lag
    replayed = replay_steps(routing, model, methods, *sizes, progress)
    return price_steps(replayed, model, run, methods, rate_sets, peak_flops_per_s)


def replay_steps(
    routing: Routing,
    model: ModelShape,
    methods: Sequence[Method],
    microbatches: int,
    steps: int,
    lag: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[StepWorks]:
    """Yield the work of each method in `steps` steps, spread over the trace.

    `lag` is the age of a forecast in recorded steps. `progress` gets the number of newly planned
    microbatches.
    """
    places = _places(model, routing.layers)
    share = None if model.lora is None else model.expert_adapters / model.expert_weights
    planners = {
        (method.name, place): method.for_model(model.for_layer(layer)).layer_planner()
        for method in methods
        for layer, place in enumerate(places)
        if place is not None
    }
    for step, forecasts in routing.walk(lag, steps, microbatches):
        works: dict[str, dict[Place, list[LayerWork]]] = {method.name: {} for method in methods}
        for layer, records in step.items():
            of_layer = [
                (works[name].setdefault(place, []), planner)
                for (name, place), planner in planners.items()
                if place.recorded == layer
            ]
            for _, planner in of_layer:
                planner.begin_step(forecasts[layer])
            for record in records[:microbatches]:
                counts_NE = routing.counts_NE(record)
                for found, planner in of_layer:
                    work = planner.work(counts_NE)
                    found.append(work if share is None else work.with_adapters(share))
                progress(1)
        yield StepWorks(places, works)


def price_steps(
    replayed: Iterable[StepWorks],
    model: ModelShape,
    run: RunShape,
    methods: Sequence[Method],
    rate_sets: Sequence[Rates],
    peak_flops_per_s: float | None = None,
) -> list[IterationPrediction]:
    """Predict iterations of all methods; `rate_sets` begins with the nominal ones."""
    collected = {method.name: _Collected() for method in methods}
    timings = [Timing(model, run, rates, rate_sets[0]) for rates in rate_sets]
    for works in replayed:
        for method in methods:
            found, work = collected[method.name], partial(works.at, method.name)
            found.iterations.append([run_iteration(method, timing, work) for timing in timings])
            found.bytes_by_kind.append(link_bytes(method, model, run, work))
            for of in works.of[method.name].values():
                for each in of[: run.microbatches]:
                    found.ratios.append(each.max_over_mean)
                    found.replans.append(each.change is not None)
                    if each.node_rows is not None:
                        found.node_rows.append(each.node_rows)
                    found.most_pairs = max(found.most_pairs, int(each.pairs_N.max()))
    peak = peak_flops_per_s or rate_sets[0].peak_flops_per_s
    return [_prediction(method, collected[method.name], model, run, peak) for method in methods]


def _places(model: ModelShape, traced_layers: int) -> list[Place | None]:
    places: list[Place | None] = []
    number = 0
    for layer, has_experts in enumerate(model.layer_has_experts):
        recorded = number * traced_layers // model.moe_layers
        place = Place(recorded, model.for_layer(layer).precision)
        places.append(place if has_experts else None)
        number += has_experts
    return places


def _prediction(
    method: Method,
    found: _Collected,
    model: ModelShape,
    run: RunShape,
    peak_flops_per_s: float,
) -> IterationPrediction:
    by_rates_s = np.array(
        [[iteration.seconds for iteration in of] for of in found.iterations]
    ).mean(axis=0)
    first = [of[0] for of in found.iterations]
    spent = {
        kind: float(np.mean([iteration.spent[kind] for iteration in first]))
        for kind in first[0].spent
    }
    tokens = run.tokens * run.microbatches * run.ranks * run.replicas
    passes = _TRAINING_PASSES if model.lora is None else _FROZEN_PASSES
    flops = passes * model.flops_per_token * tokens / run.world
    return IterationPrediction(
        method=method.name,
        by_rates_s=tuple(by_rates_s.tolist()),
        tokens=tokens,
        flops=flops,
        peak_flops_per_s=peak_flops_per_s,
        compute_s={kind: spent[kind] for kind in COMPUTE},
        exposed_s={kind: spent[kind] for kind in EXPOSED},
        waiting_s=spent[WAITING],
        bytes_by_kind={
            link: {
                kind: float(np.mean([step[link][kind] for step in found.bytes_by_kind]))
                for kind in by_kind
            }
            for link, by_kind in found.bytes_by_kind[0].items()
        },
        memory_bytes=memory_bytes(model, run, method, found.most_pairs),
        max_over_mean=float(np.mean(found.ratios)),
        replan_share=float(np.mean(found.replans)),
        node_rows=by_cause(found.node_rows),
        group=method.group,
    )
