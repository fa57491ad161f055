"""Predictions of many settings of one run: roughly, by a shortened run, or in full.

Legend: N ranks of a group, L layers, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_laer.choices import (
    Auto,
    ExchangeAlgorithm,
    Sharding,
    Unproven,
)
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.advisor.settings import Dispatch, Setting
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import (
    FSEP,
    STOCK,
    Method,
    MethodSettings,
    make_method,
)
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import (
    IterationPrediction,
    StepWorks,
    price_steps,
    replay_steps,
    stock_sizes,
)
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing, Step
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.run_settings import priced
from megatron_laer.tools.traces.records import Trace

# Sizes of a shortened run: layers without a pipeline, stages of one, recorded layers, recorded
# microbatches of a layer, and steps.
_LAYERS, _STAGES, _RECORDED_LAYERS, _RECORDED_MICROBATCHES, _STEPS = 8, 2, 4, 2, 2


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
    steps: int
    most_bytes: float
    dispatches: tuple[Dispatch, ...]
    stock_flex: bool
    flex_backend: str
    overlaps: tuple[bool, ...]
    shardings: tuple[Sharding, ...] = tuple(Sharding)
    allow: tuple[Unproven, ...] = ()

    def of_group(self, num_ranks: int) -> RunShape:
        """Return the shape with groups of N ranks."""
        return replace(
            self.shape,
            ranks=num_ranks,
            node_size=min(self.node_size, num_ranks),
            replicas=self.shape.ranks // num_ranks,
        )


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


@dataclass
class Predictor:
    """Predictions of a run's settings, which share its routing and prices."""

    run: Run
    _traces: dict[int, Trace] = field(default_factory=dict)
    _routings: dict[tuple[int, bool], Routing] = field(default_factory=dict)
    _priced: dict[tuple[Geometry, str, str], CostModel] = field(default_factory=dict)
    _walked: dict[tuple[int, bool], list[Step]] = field(default_factory=dict)
    _works: dict[tuple[Setting | int, bool], list[StepWorks]] = field(default_factory=dict)

    def stocks(self) -> list[Candidate]:
        """Return stock in each group that divides the ranks and the experts, as it may overlap."""
        groups = stock_sizes(self.run.shape.ranks, self.run.model.num_experts)
        return [
            self.stock(group, combined)
            for group in groups
            if any(size % group == 0 for size in self.run.sizes)
            for combined in (self.run.overlaps if group > 1 else (False,))
        ]

    def fsep(self, setting: Setting) -> Candidate:
        geometry = setting.geometry
        settings = MethodSettings(
            geometry,
            self._costs(geometry, setting.tokens, setting.algorithm),
            FSEPConfig(restore=setting.restore),
            topk=self.run.model.topk,
            flex=setting.is_flex,
            combined=setting.combined,
            one_queue=self.run.shape.tensor > 1,  # for which Megatron asks
        )
        method = make_method(FSEP, settings, self.run.rates[0])
        return Candidate(geometry.num_ranks, method, setting)

    def automatic(self, geometry: Geometry, tokens: Dispatch) -> ExchangeAlgorithm:
        """Return the exchange of experts that training takes by itself."""
        return self._costs(geometry, tokens, Auto.AUTO).restore_algorithm

    def stock(self, group: int, combined: bool) -> Candidate:
        """Return stock in groups of X ranks, simulated on the ranks of whole nodes."""
        run = self.run
        ranks = self._stock_ranks(group)
        experts = run.model.num_experts
        geometry = Geometry(ranks, experts, experts, min(run.node_size, ranks))
        settings = MethodSettings(
            geometry,
            self._prices(ranks),
            stock_group=group,
            topk=run.model.topk,
            stock_flex=run.stock_flex,
            combined=combined,
        )
        return Candidate(ranks, make_method(STOCK, settings, run.rates[0]))

    def _costs(
        self, geometry: Geometry, tokens: Dispatch, algorithm: ExchangeAlgorithm | Auto
    ) -> CostModel:
        key = geometry, tokens.exchange, algorithm
        if key not in self._priced:
            topk, routing = self.run.model.topk, self._routing(geometry.num_ranks)
            sizes = geometry, topk, routing.tokens(topk)
            costs = self._prices(geometry.num_ranks)
            self._priced[key] = priced(costs, sizes, tokens.exchange, algorithm)
        return self._priced[key]

    def _prices(self, num_ranks: int) -> CostModel:
        """Return prices of a group's planner, for tokens that travel by rank."""
        run, pairs = self.run, self._routing(num_ranks).pairs
        return run.model.costs(run.rates[0].cluster, run.shape.recompute, pairs)

    def _stock_ranks(self, group: int) -> int:
        """Return the fewest ranks of whole nodes, or the most below a node, with whole groups."""
        sizes = [size for size in self.run.sizes if size % group == 0]
        return min(sizes, key=lambda size: (size % self.run.node_size != 0, size))

    def least_bytes(self, candidate: Candidate) -> float:
        """Return a lower bound on a rank's memory: some rank has the mean tokens."""
        routing = self._routing(candidate.num_ranks)
        shape = self.run.of_group(candidate.num_ranks)
        parts = memory_bytes(self.run.model, shape, candidate.method, routing.pairs)
        return sum(parts.values())

    def roughly(self, candidate: Candidate) -> float:
        """Return the seconds of an iteration, from a run with fewer layers and stages.

        Layers, microbatches and the pipeline's bubbles are scaled up. Only the LM head is then
        counted wrongly, in all candidates alike.
        """
        full = self.run.of_group(candidate.num_ranks)
        model, shape, factor = _shortened(self.run.model, full)
        # A bubble per further stage takes as long as one of a stage's chunks.
        wanted = full.microbatches + (full.stages - shape.stages) / full.chunks
        microbatches = shape.stages, 2 * shape.stages, wanted
        replayed = self._replayed(candidate, model, 2 * shape.stages, _STEPS, short=True)
        sets = self.run.rates[:1]
        return factor * _extended(replayed, model, shape, candidate, sets, microbatches).iteration_s

    def fully(self, candidate: Candidate, sets: Sequence[Rates]) -> IterationPrediction:
        """Predict all layers and stages, and microbatches until further ones are alike."""
        run, shape = self.run, self.run.of_group(candidate.num_ranks)
        recorded = int(self._trace(candidate.num_ranks).microbatch_R.max()) + 1
        few = 2 * shape.stages
        many = few + shape.stages * -(-recorded // shape.stages)
        if shape.microbatches <= few + many:
            many = shape.microbatches
        replayed = self._replayed(candidate, run.model, many, run.steps, short=False)
        microbatches = few, many, shape.microbatches
        return _extended(replayed, run.model, shape, candidate, sets, microbatches)

    def _replayed(
        self, candidate: Candidate, model: ModelShape, microbatches: int, steps: int, *, short: bool
    ) -> list[StepWorks]:
        """Return the candidate's work, which is the same whether tokens overlap or not."""
        setting, method = candidate.setting, candidate.method
        same = method.group if setting is None else replace(setting, combined=False)
        assert same is not None
        if (same, short) not in self._works:
            key = candidate.num_ranks, short
            routing = self._routing(candidate.num_ranks, short=short)
            if key not in self._walked:  # FSEP's forecast is that of any number of microbatches
                self._walked[key] = list(routing.walk(steps, microbatches))
            sizes = self._walked[key], model, [method], microbatches
            self._works[same, short] = list(replay_steps(routing, *sizes))
        return self._works[same, short]

    def _trace(self, num_ranks: int) -> Trace:
        if num_ranks not in self._traces:
            self._traces[num_ranks] = self.run.trace_of(num_ranks)
        return self._traces[num_ranks]

    def _routing(self, num_ranks: int, *, short: bool = False) -> Routing:
        key = num_ranks, short
        if key not in self._routings:
            trace = self._trace(num_ranks)
            if short:
                trace = _short_trace(trace)
            self._routings[key] = Routing(trace, num_ranks, self.run.model.topk, self.run.tokens)
        return self._routings[key]


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


def _extended(
    replayed: Sequence[StepWorks],
    model: ModelShape,
    shape: RunShape,
    candidate: Candidate,
    sets: Sequence[Rates],
    microbatches: tuple[int, int, float],
) -> IterationPrediction:
    """Predict few and many microbatches, and more of them, each of which adds as much."""

    def predicted(number: int) -> IterationPrediction:
        of = replace(shape, microbatches=number)
        (found,) = price_steps(replayed, model, of, [candidate.method], sets)
        return found

    few, many, wanted = microbatches
    by_many = predicted(many)
    if many == wanted:
        return by_many
    by_few, share = predicted(few), (wanted - many) / (many - few)

    def line(start: Any, end: Any) -> Any:
        if isinstance(end, Mapping):
            return {kind: line(start[kind], of) for kind, of in end.items()}
        if isinstance(end, tuple):
            return tuple(map(line, start, end))
        return end + (end - start) * share

    spent = ("by_rates_s", "tokens", "flops", "waiting_s", "compute_s", "exposed_s")
    lines = {name: line(getattr(by_few, name), getattr(by_many, name)) for name in spent}
    return replace(by_many, **lines)
