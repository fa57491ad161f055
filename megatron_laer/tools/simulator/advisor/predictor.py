"""Predictions of many settings of one run: roughly, by a shortened run, or in full.

Legend: N ranks of a group, L layers, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from megatron_laer.choices import Auto, Dispatch, Sharding, Unproven
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.advisor.settings import Setting
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import Method, MethodSettings, fsep, stock
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import (
    SPENT,
    IterationPrediction,
    StepWorks,
    price_steps,
    replay_steps,
    stock_sizes,
    weighted,
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
class Run:
    """A run whose settings are sought.

    `shape` has a stage's ranks as one group, `sizes` are those of possible groups, 1 for stock, and
    `node_size` is the cluster's. `trace_of` makes the routing of a number of ranks, with other
    `tokens` of a rank if these are given. `flex_backend` is the flex dispatcher's, `overlaps` are
    possible values of combined 1F1B, and `allow` words for `--fsep-allow-unproven`.
    """

    model: ModelShape
    shape: RunShape
    sizes: tuple[int, ...]
    node_size: int
    rates: tuple[Rates, ...]
    trace_of: Callable[[int], Trace]
    tokens: int | None
    most_bytes: float
    dispatches: tuple[Dispatch, ...]
    flex_backend: str
    overlaps: tuple[bool, ...]
    shardings: tuple[Sharding, ...] = tuple(Sharding)
    allow: tuple[Unproven, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A method to train with; `setting` is None for stock."""

    num_ranks: int
    method: Method
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
    def label(self) -> str:
        if self.setting is None:
            return f"stock EP{self.method.group}{', overlap' if self.combined else ''}"
        return self.setting.label


@dataclass(frozen=True, eq=False)
class _Extent:
    """Simulated part of a run in groups of some size: all of it, or a shortened one.

    Iterations of `few` and `many` microbatches are extended to `wanted`, and then by `factor`.
    """

    model: ModelShape
    shape: RunShape
    routing: Routing
    steps: int
    few: int
    many: int
    wanted: float
    factor: float = 1.0

    @cached_property
    def walked(self) -> list[Step]:
        """Return the steps with FSEP's forecasts, which are those of any number of microbatches."""
        return list(self.routing.walk(self.steps, self.many))


class Predictor:
    """Predictions of a run's settings, which share its routing and prices."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trace = cache(run.trace_of)
        self._extent = cache(self._new_extent)
        self._costs = cache(self._priced)
        self._works: dict[tuple[Setting | int, bool], list[StepWorks]] = {}

    def stocks(self) -> list[Candidate]:
        """Return stock in each group that divides the ranks and the experts, as it may overlap."""
        groups = stock_sizes(self.run.shape.ranks, self.run.model.num_experts)
        return [
            self.stock(group, combined)
            for group in groups
            if any(size % group == 0 for size in self.run.sizes)
            for combined in (self.run.overlaps if group > 1 else (False,))
        ]

    def stock(self, group: int, combined: bool) -> Candidate:
        """Return stock in groups of X ranks, simulated on the ranks of whole nodes.

        Where a node's are too many, they are the most that whole groups make.
        """
        run, experts = self.run, self.run.model.num_experts
        sizes = [size for size in run.sizes if size % group == 0]
        ranks = min(sizes, key=lambda size: (size % run.node_size != 0, size))
        settings = MethodSettings(
            Geometry(ranks, experts, experts, min(run.node_size, ranks)),
            self._by_rank(ranks),
            stock_group=group,
            topk=run.model.topk,
            stock_flex=Dispatch.FLEX in run.dispatches,
            combined=combined,
        )
        return Candidate(ranks, stock(settings, run.rates[0]))

    def fsep(self, setting: Setting) -> Candidate:
        geometry = setting.geometry
        settings = MethodSettings(
            geometry,
            self._costs(geometry, setting.tokens),
            setting.config,
            topk=self.run.model.topk,
            combined=setting.combined,
        )
        method = fsep(settings, self.run.rates[0])
        return Candidate(geometry.num_ranks, method, setting)

    def least_bytes(self, candidate: Candidate) -> float:
        """Return a lower bound on a rank's memory: some rank has the mean tokens."""
        of = self._extent(candidate.num_ranks, False)
        return sum(memory_bytes(of.model, of.shape, candidate.method, of.routing.pairs).values())

    def roughly(self, candidate: Candidate) -> float:
        """Return the seconds of an iteration, from a run with fewer layers and stages.

        Layers, microbatches and the pipeline's bubbles are scaled up. Only the LM head is then
        counted wrongly, in all candidates alike.
        """
        of = self._extent(candidate.num_ranks, True)
        return of.factor * self.predict(candidate, self.run.rates[:1], rough=True).iteration_s

    def predict(
        self, candidate: Candidate, sets: Sequence[Rates], *, rough: bool = False
    ) -> IterationPrediction:
        """Predict few and many microbatches, and more of them, each of which adds as much."""
        of, method = self._extent(candidate.num_ranks, rough), candidate.method
        # Stock's work is the same whether tokens overlap or not.
        key = candidate.setting or method.group
        assert key is not None
        if (key, rough) not in self._works:
            replayed = replay_steps(of.routing, of.walked, of.model, [method], of.many)
            self._works[key, rough] = list(replayed)

        def predicted(number: int) -> IterationPrediction:
            shape = replace(of.shape, microbatches=number)
            (found,) = price_steps(self._works[key, rough], of.model, shape, [method], sets)
            return found

        by_many = predicted(of.many)
        if of.many == of.wanted:
            return by_many
        share = (of.wanted - of.many) / (of.many - of.few)
        return weighted([by_many, predicted(of.few)], [1 + share, -share], SPENT)

    def _new_extent(self, num_ranks: int, rough: bool) -> _Extent:
        """Return the whole run, or a rough one with fewer layers, stages and records."""
        run, trace = self.run, self._trace(num_ranks)
        topk, stages, replicas = run.model.topk, run.shape.stages, run.shape.ranks // num_ranks
        node_size = min(run.node_size, num_ranks)
        full = replace(run.shape, ranks=num_ranks, node_size=node_size, replicas=replicas)
        if rough:
            model, shape, factor = _shortened(run.model, full)
            routing = Routing(_short_trace(trace), num_ranks, topk, run.tokens)
            few = shape.stages
            # A bubble per further stage takes as long as one of a stage's chunks.
            wanted = full.microbatches + (stages - few) / full.chunks
            return _Extent(model, shape, routing, _ROUGH_STEPS, few, 2 * few, wanted, factor)
        routing = Routing(trace, num_ranks, topk, run.tokens)
        recorded, few = int(trace.microbatch_R.max()) + 1, 2 * stages
        many = few + stages * -(-recorded // stages)
        if full.microbatches <= few + many:
            many = full.microbatches
        return _Extent(run.model, full, routing, _STEPS, few, many, full.microbatches)

    def _by_rank(self, num_ranks: int) -> CostModel:
        """Return prices of a group's planner, for tokens that travel by rank."""
        run, pairs = self.run, self._extent(num_ranks, False).routing.pairs
        costs = run.model.costs(run.rates[0].cluster, run.shape.recompute, pairs)
        # Combined 1F1B may hold twice as many, which work that both share leaves out.
        return replace(costs, layers=len(run.model.layer_has_experts), sharers=run.shape.tensor)

    def _priced(self, geometry: Geometry, tokens: Dispatch) -> CostModel:
        """Return prices with training's choice of the exchange of experts."""
        topk = self.run.model.topk
        routing = self._extent(geometry.num_ranks, False).routing
        sizes = geometry, topk, routing.tokens(topk)
        return priced(self._by_rank(geometry.num_ranks), sizes, tokens, Auto.AUTO)


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
