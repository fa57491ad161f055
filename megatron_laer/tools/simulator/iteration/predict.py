"""Prediction of each method's iterations on a trace, as a range over the rates.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_laer.tools.simulator.iteration.clocks import COMPUTE, EXPOSED, WAITING
from megatron_laer.tools.simulator.iteration.iterate import Stages
from megatron_laer.tools.simulator.iteration.layer_times import Timing
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import STOCK, Method, MethodSettings, stock
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import LayerWork
from megatron_laer.tools.simulator.replay import Routing, Step

# A token's FLOPs in forward and backward, over those of forward.
_TRAINING_PASSES = 3
# Fields of a prediction that grow with its microbatches.
SPENT = ("by_rates_s", "tokens", "flops", "compute_s", "exposed_s", "waiting_s")

# Microbatches that are simulated one by one.
_MOST_MICROBATCHES = 64

Predict = Callable[[Sequence[Method], Sequence[Rates]], Sequence["IterationPrediction"]]


@dataclass(frozen=True)
class IterationPrediction:
    """Predicted iteration of a method; means over steps, and over ranks unless stated.

    `by_rates_s` has the time for each set of rates, nominal first. `tokens` are of all ranks, and
    `flops` of a rank, without recompute. `compute_s` and `exposed_s`, by kind, and `waiting_s` for
    slower ranks add up to `iteration_s`.
    `memory_bytes` are of the rank and stage that need most. `group` and `dispatcher` are stock's.
    """

    method: str
    by_rates_s: tuple[float, ...]
    tokens: float
    flops: float
    peak_flops_per_s: float
    compute_s: Mapping[str, float]
    exposed_s: Mapping[str, float]
    waiting_s: float
    memory_bytes: Mapping[str, float]
    max_over_mean: float
    group: int | None = None
    dispatcher: str | None = None

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
    def tokens_per_s(self) -> float:
        return self.tokens / self.iteration_s

    @property
    def mfu(self) -> float:
        return self.flops / (self.iteration_s * self.peak_flops_per_s)

    @property
    def title(self) -> str:
        if self.group is None:
            return self.method
        return f"{self.method} EP{self.group} ({self.dispatcher})"

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory_bytes.values())


@dataclass(frozen=True)
class StepWorks:
    """Outcomes of one step as work of each microbatch, by method and recorded layer.

    `recorded` are the layers of the trace whose routing the model's have; None has no experts.
    """

    recorded: Sequence[int | None]
    of: Mapping[str, Mapping[int, Sequence[LayerWork]]]

    def at(self, method: str, layer: int, microbatch: int) -> LayerWork | None:
        place = self.recorded[layer]
        if place is None:
            return None
        works = self.of[method][place]
        return works[microbatch % len(works)]


def predict_iterations(
    routing: Routing,
    model: ModelShape,
    run: RunShape,
    methods: Sequence[Method],
    rate_sets: Sequence[Rates],
    *,
    steps: int = 1,
    progress: Callable[[Iterable[Step]], Iterable[Step]] = iter,
    most: int = _MOST_MICROBATCHES,
) -> list[IterationPrediction]:
    """Replay steps of a trace, and price iterations of all methods with their work.

    Iterations of more microbatches than `most` are extended from shorter ones.
    """
    walked = progress(routing.walk(steps, run.microbatches))
    few, many = fewer_microbatches(run, routing)
    if run.microbatches <= max(most, many):
        replayed = replay_steps(routing, walked, model, methods, run.microbatches)
        return price_steps(replayed, model, run, methods, rate_sets)
    works = list(replay_steps(routing, walked, model, methods, many))
    by_few, by_many = (
        price_steps(works, model, replace(run, microbatches=number), methods, rate_sets)
        for number in (few, many)
    )
    return [extended(*of, few, many, run.microbatches) for of in zip(by_few, by_many, strict=True)]


def fewer_microbatches(run: RunShape, routing: Routing) -> tuple[int, int]:
    """Return two numbers of microbatches, between which each one adds as much as any further one.

    They are beyond the pipeline's warm-up, and as far apart as the recorded microbatches.
    """
    few = 2 * run.stages
    return few, few + run.stages * -(-routing.microbatches // run.stages)


def extended(
    by_few: IterationPrediction, by_many: IterationPrediction, few: int, many: int, wanted: float
) -> IterationPrediction:
    """Extend predictions of few and many microbatches to a wanted number."""
    share = (wanted - many) / (many - few)
    return weighted([by_many, by_few], [1 + share, -share], SPENT)


def replay_steps(
    routing: Routing,
    walked: Iterable[Step],
    model: ModelShape,
    methods: Sequence[Method],
    microbatches: int,
) -> Iterator[StepWorks]:
    """Yield the work of each method in steps of `routing.walk`."""
    recorded = _recorded_layers(model, routing.layers)
    planners = {
        layer: {method.name: method.layer_planner() for method in methods}
        for layer in dict.fromkeys(recorded)
        if layer is not None
    }
    for step, forecasts in walked:
        works: dict[str, dict[int, list[LayerWork]]] = {method.name: {} for method in methods}
        for layer, of_methods in planners.items():
            for planner in of_methods.values():
                planner.begin_step(forecasts[layer])
            for record in step[layer][:microbatches]:
                counts_NE = routing.counts_NE(record)
                for name, planner in of_methods.items():
                    works[name].setdefault(layer, []).append(planner.work(counts_NE))
        yield StepWorks(recorded, works)


def price_steps(
    replayed: Iterable[StepWorks],
    model: ModelShape,
    run: RunShape,
    methods: Sequence[Method],
    rate_sets: Sequence[Rates],
) -> list[IterationPrediction]:
    """Predict iterations of all methods; `rate_sets` begins with the nominal ones."""
    timings = [Timing(model, run, rates, rate_sets[0]) for rates in rate_sets]
    found: dict[str, list[IterationPrediction]] = {method.name: [] for method in methods}
    for works in replayed:
        for method in methods:
            found[method.name].append(_of_step(method, works, timings))
    return [
        weighted(of, [1 / len(of)] * len(of), (*SPENT, "max_over_mean")) for of in found.values()
    ]


def weighted(
    predictions: Sequence[IterationPrediction], weights: Sequence[float], names: Sequence[str]
) -> IterationPrediction:
    """Add up these fields of a method's predictions; others are of the first that needs most."""

    def total(*values: Any) -> Any:
        if isinstance(values[0], Mapping):
            return {kind: total(*(value[kind] for value in values)) for kind in values[0]}
        if isinstance(values[0], tuple):
            return tuple(map(total, *values))
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    most = max(predictions, key=lambda of: of.peak_bytes)
    return replace(
        most, **{name: total(*(getattr(of, name) for of in predictions)) for name in names}
    )


def _of_step(method: Method, works: StepWorks, timings: Sequence[Timing]) -> IterationPrediction:
    """Predict an iteration with the work of one step."""
    model, run, work = timings[0].model, timings[0].run, partial(works.at, method.name)
    iterations = [Stages(method, timing, work).run() for timing in timings]
    spent, tokens = iterations[0].spent, run.tokens * run.microbatches * run.ranks * run.replicas
    done = [each for of in works.of[method.name].values() for each in of[: run.microbatches]]
    most_pairs = max(int(each.pairs_N.max()) for each in done)
    return IterationPrediction(
        method=method.name,
        by_rates_s=tuple(iteration.seconds for iteration in iterations),
        tokens=tokens,
        flops=_TRAINING_PASSES * model.flops_per_token * tokens / run.world,
        peak_flops_per_s=timings[0].rates.peak_flops_per_s,
        compute_s={kind: spent[kind] for kind in COMPUTE},
        exposed_s={kind: spent[kind] for kind in EXPOSED},
        waiting_s=spent[WAITING],
        memory_bytes=memory_bytes(model, run, method, most_pairs, _kept_pairs(model, run, work)),
        max_over_mean=float(np.mean([each.max_over_mean for each in done])),
        group=method.group,
        dispatcher=method.dispatcher,
    )


def _kept_pairs(
    model: ModelShape, run: RunShape, work: Callable[[int, int], LayerWork | None]
) -> list[float]:
    """Return the busiest rank's mean pairs over a stage's layers, of the fullest microbatch."""
    found = []
    for stage in range(run.stages):
        layers = run.stage_layers(len(model.layer_has_experts), stage)
        most = 0.0
        for microbatch in range(run.microbatches):
            works = [of for layer in layers if (of := work(layer, microbatch)) is not None]
            if works:
                most = max(most, float(np.mean([of.pairs_N for of in works], axis=0).max()))
        found.append(most)
    return found


def _recorded_layers(model: ModelShape, traced_layers: int) -> list[int | None]:
    layers: list[int | None] = []
    number = 0
    for has_experts in model.layer_has_experts:
        layers.append(number * traced_layers // model.moe_layers if has_experts else None)
        number += has_experts
    return layers


def stock_sizes(num_ranks: int, num_experts: int) -> list[int]:
    """Return the sizes of groups that divide N and E."""
    both = math.gcd(num_ranks, num_experts)
    return [size for size in range(1, both + 1) if both % size == 0]


def fastest_stock(
    settings: MethodSettings,
    rates: Rates,
    predict: Predict,
    most_bytes: float | None,
    flex: Sequence[bool] = (False, True),
) -> Method:
    """Return stock in the group that was given, else in the fastest of those that fit in memory.

    `flex` are the dispatchers that are tried. Groups smaller than a node only count under a limit
    of memory: without one, each rank could hold all experts. If none fits, it is the group that
    needs least.
    """
    geometry = settings.geometry
    groups = stock_sizes(geometry.num_ranks, geometry.num_experts)
    if most_bytes is None:
        in_node = max(size for size in groups if size <= geometry.node_size)
        groups = [size for size in groups if size >= in_node]
    if settings.stock_group is not None:
        groups = [settings.stock_group]
    made = [
        stock(replace(settings, stock_group=group, stock_flex=is_flex), rates)
        for group in groups
        for is_flex in (flex if group > 1 else (False,))
    ]
    if len(made) == 1:
        return made[0]
    names = [f"{STOCK} EP{method.group} {method.dispatcher}" for method in made]
    named = [replace(method, name=name) for method, name in zip(made, names, strict=True)]
    found = predict(named, [rates])
    order = sorted(range(len(made)), key=lambda place: found[place].iteration_s)
    fits = [place for place in order if most_bytes is None or found[place].peak_bytes <= most_bytes]
    least = min(order, key=lambda place: found[place].peak_bytes)
    return made[(fits or [least])[0]]
