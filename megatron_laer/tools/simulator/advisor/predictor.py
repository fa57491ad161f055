"""Predictions of many settings of one run: roughly, by a shortened run, or in full.

Legend: N ranks of a group, L layers, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from megatron_laer.choices import Auto, Dispatch, Recompute, Sharding, Unproven
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.advisor.settings import Setting
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import Method, MethodSettings, fsep, stock
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import (
    IterationPrediction,
    StepWorks,
    extended,
    fewer_microbatches,
    price_steps,
    replay_steps,
    stock_sizes,
)
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.replay import Routing, Step
from megatron_laer.tools.simulator.run_settings import priced
from megatron_laer.tools.traces.records import Trace

_STEPS = 3
# Sizes of a shortened run: layers without a pipeline, stages of one, recorded layers, recorded
# microbatches of a layer, and steps.
_LAYERS, _STAGES, _RECORDED_LAYERS, _RECORDED_MICROBATCHES, _ROUGH_STEPS = 8, 2, 4, 2, 2


@dataclass(frozen=True)
class Variant:
    """A shape of the run, which `flags` next to the given ones ask for.

    It has a stage's ranks as one group. `overlaps` are possible values of combined 1F1B.
    """

    shape: RunShape
    flags: tuple[str, ...]
    overlaps: tuple[bool, ...]


@dataclass(frozen=True)
class Run:
    """A run whose settings are sought.

    `as_given` is the run by its flags alone, where stock has the flex dispatcher if `gives_flex`.
    `variants` are those in which settings are sought; one is tried where the one before it does not
    fit in memory. `sizes` are those of possible groups, 1 for stock, and `node_size` is the
    cluster's. `trace_of` makes the routing of a number of ranks, with other `tokens` of a rank if
    these are given. `dispatches` are those that the flags allow, `flex_backend` is the flex
    dispatcher's, and `allow` has words for `--fsep-allow-unproven`.
    """

    model: ModelShape
    as_given: Variant
    gives_flex: bool
    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    node_size: int
    rates: tuple[Rates, ...]
    trace_of: Callable[[int], Trace]
    tokens: int | None
    most_bytes: float
    dispatches: tuple[Dispatch, ...]
    flex_backend: str
    shardings: tuple[Sharding, ...] = tuple(Sharding)
    allow: tuple[Unproven, ...] = ()

    @property
    def shape(self) -> RunShape:
        return self.as_given.shape

    @property
    def allows_flex(self) -> bool:
        return Dispatch.FLEX in self.dispatches


@dataclass(frozen=True)
class Candidate:
    """A method to train with; `setting` is None for stock."""

    num_ranks: int
    method: Method
    variant: Variant
    setting: Setting | None = None

    @property
    def combined(self) -> bool:
        return self.method.schedule.by_parts

    @property
    def shape(self) -> Hashable:
        """Return the geometry, of which one candidate is predicted in full; the label for stock."""
        return self.label if self.setting is None else self.setting.geometry

    @property
    def kind(self) -> Hashable:
        """Return size and sharding of the group, of which one is shown; the label for stock."""
        of = self.setting
        return self.label if of is None else (self.num_ranks, of.geometry.sharding)

    @property
    def layout(self) -> Hashable:
        """Return what other variants of the run have too: the geometry; the group for stock."""
        return self.method.group if self.setting is None else self.setting.geometry

    @property
    def leaves_nodes(self) -> bool:
        return self.setting is not None and self.setting.geometry.num_nodes > 1

    @property
    def dispatcher(self) -> str:
        """Return Megatron's dispatcher of tokens, for `--moe-token-dispatcher-type`."""
        if self.setting is None:
            return str(self.method.dispatcher)
        return "flex" if self.setting.is_flex else "alltoall"

    @property
    def label(self) -> str:
        again = ["full recompute"] * (self.variant.shape.recompute == Recompute.FULL)
        if self.setting is not None:
            return ", ".join([self.setting.label, *again])
        words = [self.dispatcher, *["overlap"] * self.combined, *again]
        return f"stock EP{self.method.group} ({', '.join(words)})"


@dataclass(frozen=True, eq=False)
class _Extent:
    """Simulated part of a run in groups of some size: all of it, or a shortened one.

    Iterations of `few` and `many` microbatches are extended to `wanted`, and then by `factor`.
    """

    model: ModelShape
    shape: RunShape
    routing: Routing
    few: int
    many: int
    wanted: float
    factor: float = 1.0


class Predictor:
    """Predictions of a run's settings, which share its routing and prices."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trace = cache(run.trace_of)
        self._routing = cache(self._new_routing)
        self._walked = cache(self._new_walk)
        self._extent = cache(self._new_extent)
        self._costs = cache(self._priced)
        self._works: dict[Hashable, list[StepWorks]] = {}

    def stocks(self, variant: Variant, flex: Sequence[bool]) -> list[Candidate]:
        """Return stock in each group that divides the ranks and the experts, as it may overlap."""
        groups = stock_sizes(self.run.shape.ranks, self.run.model.num_experts)
        return [
            self.stock(group, variant, is_flex=is_flex, combined=combined)
            for group in groups
            if any(size % group == 0 for size in self.run.sizes)
            for is_flex, combined in product(flex, variant.overlaps)
            if group > 1 or not (is_flex or combined)  # each of which needs a group
        ]

    def stock(self, group: int, variant: Variant, *, is_flex: bool, combined: bool) -> Candidate:
        """Return stock in groups of X ranks, simulated on the ranks of whole nodes.

        Where a node's are too many, they are the most that whole groups make.
        """
        run, experts = self.run, self.run.model.num_experts
        sizes = [size for size in run.sizes if size % group == 0]
        ranks = min(sizes, key=lambda size: (size % run.node_size != 0, size))
        settings = MethodSettings(
            Geometry(ranks, experts, experts, min(run.node_size, ranks)),
            self._by_rank(ranks, variant.shape),
            stock_group=group,
            topk=run.model.topk,
            stock_flex=is_flex,
            combined=combined,
        )
        return Candidate(ranks, stock(settings, run.rates[0]), variant)

    def fsep(self, setting: Setting, variant: Variant) -> Candidate:
        geometry = setting.geometry
        settings = MethodSettings(
            geometry,
            self._costs(geometry, setting.tokens, variant.shape),
            setting.config,
            topk=self.run.model.topk,
            combined=setting.combined,
        )
        method = fsep(settings, self.run.rates[0])
        return Candidate(geometry.num_ranks, method, variant, setting)

    def least_bytes(self, candidate: Candidate) -> float:
        """Return a lower bound on a rank's memory: some rank has the mean tokens."""
        of = self._extent(candidate.num_ranks, candidate.variant.shape, False)
        return sum(memory_bytes(of.model, of.shape, candidate.method, of.routing.pairs).values())

    def roughly(self, candidate: Candidate) -> float:
        """Return the seconds of an iteration, from a run with fewer layers and stages.

        Layers, microbatches and the pipeline's bubbles are scaled up. Only the LM head is then
        counted wrongly, in all candidates alike.
        """
        of = self._extent(candidate.num_ranks, candidate.variant.shape, True)
        return of.factor * self.predict(candidate, self.run.rates[:1], rough=True).iteration_s

    def predict(
        self, candidate: Candidate, sets: Sequence[Rates], *, rough: bool = False
    ) -> IterationPrediction:
        """Predict few and many microbatches, and more of them, each of which adds as much."""
        of = self._extent(candidate.num_ranks, candidate.variant.shape, rough)
        method = candidate.method
        # Stock's work is the same whether tokens overlap or not.
        setting = candidate.setting or (method.group, method.dispatcher)
        key = setting, of.shape.recompute, rough, of.many
        if key not in self._works:
            walked = self._walked(candidate.num_ranks, rough, of.many)
            replayed = replay_steps(of.routing, walked, of.model, [method], of.many)
            self._works[key] = list(replayed)

        def predicted(number: int) -> IterationPrediction:
            shape = replace(of.shape, microbatches=number)
            (found,) = price_steps(self._works[key], of.model, shape, [method], sets)
            return found

        by_many = predicted(of.many)
        if of.many == of.wanted:
            return by_many
        return extended(predicted(of.few), by_many, of.few, of.many, of.wanted)

    def _new_extent(self, num_ranks: int, whole: RunShape, rough: bool) -> _Extent:
        """Return the whole run, or a rough one with fewer layers, stages and records."""
        run = self.run
        stages, replicas = whole.stages, whole.ranks // num_ranks
        node_size = min(run.node_size, num_ranks)
        full = replace(whole, ranks=num_ranks, node_size=node_size, replicas=replicas)
        if rough:
            model, shape, factor = _shortened(run.model, full)
            few = shape.stages
            # A bubble per further stage takes as long as one of a stage's chunks.
            wanted = full.microbatches + (stages - few) / full.chunks
            routing = self._routing(num_ranks, rough)
            return _Extent(model, shape, routing, few, 2 * few, wanted, factor)
        routing = self._routing(num_ranks, rough)
        few, many = fewer_microbatches(full, routing)
        if full.microbatches <= few + many:
            many = full.microbatches
        return _Extent(run.model, full, routing, few, many, full.microbatches)

    def _new_routing(self, num_ranks: int, rough: bool) -> Routing:
        trace = self._trace(num_ranks)
        return Routing(
            _short_trace(trace) if rough else trace, num_ranks, self.run.model.topk, self.run.tokens
        )

    def _new_walk(self, num_ranks: int, rough: bool, microbatches: int) -> list[Step]:
        """Return the steps with FSEP's forecasts, which variants of the run share."""
        steps = _ROUGH_STEPS if rough else _STEPS
        return list(self._routing(num_ranks, rough).walk(steps, microbatches))

    def _by_rank(self, num_ranks: int, whole: RunShape) -> CostModel:
        """Return prices of a group's planner, for tokens that travel by rank."""
        run, pairs = self.run, self._extent(num_ranks, whole, False).routing.pairs
        costs = run.model.costs(run.rates[0].cluster, whole.recompute, pairs)
        # Combined 1F1B may hold twice as many, which work that both share leaves out.
        return replace(costs, layers=len(run.model.layer_has_experts), sharers=whole.tensor)

    def _priced(self, geometry: Geometry, tokens: Dispatch, whole: RunShape) -> CostModel:
        """Return prices with training's choice of the exchange of experts."""
        topk = self.run.model.topk
        routing = self._extent(geometry.num_ranks, whole, False).routing
        sizes = geometry, topk, routing.tokens(topk)
        return priced(self._by_rank(geometry.num_ranks, whole), sizes, tokens, Auto.AUTO)


def _shortened(model: ModelShape, run: RunShape) -> tuple[ModelShape, RunShape, float]:
    """Return the model and run with fewer layers and stages, and the factor on their time."""
    layers = model.layer_has_experts
    stages = min(run.stages, _STAGES)
    if run.stages == 1:
        kept = min(len(layers), _LAYERS)
    else:
        kept = -(-len(layers) // (run.stages * run.chunks)) * stages * run.chunks
    tail = layers[-kept:]
    if not any(tail):
        return model, run, 1.0
    factor = len(layers) / kept if run.stages == 1 else 1.0
    return replace(model, layer_has_experts=tail), replace(run, stages=stages), factor


def _short_trace(trace: Trace) -> Trace:
    """Return the records of a few layers and microbatches."""
    layers = len(trace.layers)
    kept = np.unique(np.linspace(0, layers - 1, min(layers, _RECORDED_LAYERS)).round())
    chosen_R = np.isin(trace.layer_R, kept) & (trace.microbatch_R < _RECORDED_MICROBATCHES)
    if chosen_R.all():
        return trace
    part = trace.part(chosen_R)
    names = tuple(trace.layers[int(layer)] for layer in kept)
    return replace(part, layers=names, layer_R=np.searchsorted(kept, part.layer_R))
