"""One iteration of a method: all microbatches, data-parallel exchanges and the optimizer.

Legend: N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from megatron_laer.planner.state_bytes import GRADIENT_BYTES, OPTIMIZER_BYTES
from megatron_laer.tools.simulator.iteration.chunk import Following, LayerTimes, Pass
from megatron_laer.tools.simulator.iteration.chunk import run as run_passes
from megatron_laer.tools.simulator.iteration.clocks import KINDS, WAITING, Clocks, Flight
from megatron_laer.tools.simulator.iteration.layer_times import Timing
from megatron_laer.tools.simulator.iteration.memory_parts import stage_state
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.pipeline import Operation, Operations, order, sweep
from megatron_laer.tools.simulator.iteration.rates import slowest_pace
from megatron_laer.tools.simulator.iteration.work import LayerWork

# Bytes that the optimizer moves per weight: main weight, gradient and two moments read; main
# weight, moments and the bf16 weight written.
_MOVED_BYTES = 4 * 4 + 3 * 4 + 2
# Collectives for the gradients' norm and the number of tokens.
_STEP_COLLECTIVES = 2


@dataclass(frozen=True)
class Iteration:
    """Time of an iteration; `spent`, by kind and a mean over all ranks, adds up to `seconds`."""

    seconds: float
    spent: Mapping[str, float]


class Stages:
    """An iteration's stages, with times of layers that serve all passes with the same work.

    `work` returns that of a layer and microbatch; None for dense layers.
    """

    def __init__(
        self, method: Method, timing: Timing, work: Callable[[int, int], LayerWork | None]
    ) -> None:
        self._method, self._timing, self._work = method, timing, work
        self._model, self._run, self._rates = timing.model, timing.run, timing.rates
        self._by_place = self._run.layers_by_chunk(len(self._model.layer_has_experts))
        self._kept: dict[tuple[int, int, bool, bool], LayerTimes] = {}
        contention, schedule = self._rates.cluster.contention, method.schedule
        hides = schedule.restores_ahead or schedule.by_parts
        self._stages = [
            Clocks(
                self._run.ranks,
                self._run.node_size,
                pace=slowest_pace(self._run.world),
                contention=contention.gemm - 1.0,
                stretch=contention.exchange if hides else 1.0,
                one_stream=method.one_stream,
            )
            for _ in range(self._run.stages)
        ]

    def run(self) -> Iteration:
        """Run one iteration."""
        stages, run = self._stages, self._run
        for clocks in stages:
            clocks.work("host", self._rates.gap_s)
            clocks.gathered_s = self._rates.gap_s
        sizes, by_parts = (run.stages, run.chunks, run.microbatches), self._method.schedule.by_parts
        orders = [order(stage, *sizes, by_parts=by_parts) for stage in range(run.stages)]
        following = [self._following(stage, of_stage) for stage, of_stage in enumerate(orders)]
        # First restores of coming operations, by whether forwards are in their order.
        fetched: list[dict[bool, Flight | None]] = [{} for _ in range(run.stages)]

        def operate(stage: int, operations: Operations) -> None:
            begun = {}
            for each in reversed(operations):
                place = each.chunk * run.stages + stage
                ends = place == run.stages * run.chunks - 1
                of = Pass(
                    *(stages[stage], self._layers(place, each.microbatch), self._method.schedule),
                    *(fetched[stage].get(self._order_of(each)), following[stage].get(each)),
                    is_backward=not each.is_forward,
                    head_s=self._timing.head_seconds()[not each.is_forward] if ends else 0.0,
                    in_turn=len(operations) > 1,
                )
                begun[self._order_of(each)] = of.parts()
            fetched[stage] |= zip(begun, run_passes(*begun.values()), strict=True)

        sweep(stages, orders, run.chunks, operate, self._timing.send_seconds())
        self._finish()
        seconds = max(float(clocks.now_N.max()) for clocks in stages)
        spent = {
            kind: float(np.mean([clocks.spent[kind].mean() for clocks in stages])) for kind in KINDS
        }
        return Iteration(seconds, spent)

    def _finish(self) -> None:
        """Exchange data-parallel gradients that are left, and update the weights."""
        run, rates, stages = self._run, self._rates, self._stages
        for stage, clocks in enumerate(stages):
            if not run.overlaps_data_parallel:
                layers = run.stage_layers(len(self._model.layer_has_experts), stage)
                clocks.meet()
                exchanged = (self._data_parallel(layer) for layer in layers)
                clocks.work("data_parallel", sum(map(sum, exchanged)))
            clocks.wait("data_parallel", clocks.scattered_s)
            clocks.meet()
        last_s = max(float(clocks.now_N.max()) for clocks in stages)
        latency_s = rates.collective_seconds(run.world, run.node_size)
        for stage, clocks in enumerate(stages):
            clocks.wait("pipeline", last_s)
            clocks.work("optimizer", _STEP_COLLECTIVES * latency_s)
            state = stage_state(self._model, run, self._method, stage)
            moved_bytes = state.optimizer / OPTIMIZER_BYTES * _MOVED_BYTES
            clocks.work("optimizer", rates.memory_seconds(moved_bytes))
        end_s = max(float(clocks.now_N.max()) for clocks in stages)
        for clocks in stages:
            clocks.wait(WAITING, end_s)

    def _order_of(self, operation: Operation) -> bool:
        """Return whether forwards are in an operation's order, as `OperationOrder.order_of`."""
        return operation.is_forward or not self._method.schedule.by_parts

    def _following(self, stage: int, order: Sequence[Operations]) -> dict[Operation, Following]:
        """Return the layers that are fetched during operations, where chunks have MoE layers."""
        first_of: dict[bool, list[tuple[Operation, LayerTimes]]] = {True: [], False: []}
        follows = self._method.schedule.restores_following and not self._run.synchronises
        for each in chain.from_iterable(order) if follows else ():
            place = each.chunk * self._run.stages + stage
            layers = [of for of in self._layers(place, each.microbatch) if of.moe is not None]
            if layers:
                first = layers[0 if each.is_forward else -1]
                first_of[self._order_of(each)].append((each, first))
        found = {
            before: Following(layer, not after.is_forward, after.microbatch == before.microbatch)
            for operations in first_of.values()
            for (before, _), (after, layer) in pairwise(operations)
        }
        # The last layer of a forward stays where the backward that runs with it is followed by its.
        backwards = dict(pairwise(each for each, _ in first_of[False]))
        for pair in order:
            if backwards.get(pair[-1]) == replace(pair[0], is_forward=False):
                found |= {each: replace(found[each], stays=True) for each in pair if each in found}
        return found

    def _layers(self, place: int, microbatch: int) -> list[LayerTimes]:
        """Return the layers of a chunk; work that recurs has the same times."""
        first, last = microbatch == 0, microbatch == self._run.microbatches - 1
        found = []
        for layer in self._by_place[place]:
            work = self._work(layer, microbatch)
            key = layer, id(work), first, last
            if key not in self._kept:
                exchanged = (0.0, 0.0)
                if self._run.overlaps_data_parallel:
                    exchanged = self._data_parallel(layer)
                ends = (first, last), exchanged
                self._kept[key] = self._timing.layer(layer, work, self._method.schedule, *ends)
            found.append(self._kept[key])
        return found

    def _data_parallel(self, layer: int) -> tuple[float, float]:
        """Return the times of gathering a layer's parameters and reducing its gradients in a step.

        Dense ones go over the stage's data-parallel ranks, experts' over the ranks that hold the
        same.
        """
        model, run, replicas = self._model, self._run, self._method.replicas
        has_experts = model.layer_has_experts[layer]
        dense = model.layer_weights(has_experts) / run.tensor
        rings = [(dense, run.data_parallel, run.tensor)]
        if has_experts:
            experts = self._method.experts_held * model.expert_weights
            rings.append((experts, replicas * run.replicas, run.ranks // replicas))
        gather_s, scatter_s = zip(*(self._ring_seconds(*ring) for ring in rings), strict=True)
        return sum(gather_s), sum(scatter_s)

    def _ring_seconds(self, weights: float, copies: int, stride: int) -> tuple[float, float]:
        """Return the times of gathering weights, and of reducing their gradients.

        Without the distributed optimizer, gradients are all-reduced and nothing is gathered.
        """
        rates, ring = self._rates, (copies, self._run.node_size, stride)
        reduced_s = rates.ring_seconds(weights * GRADIENT_BYTES, *ring)
        if not self._run.shards_optimizer:
            return 0.0, 2 * reduced_s
        return rates.ring_seconds(weights * self._model.bytes_per_element, *ring), reduced_s
