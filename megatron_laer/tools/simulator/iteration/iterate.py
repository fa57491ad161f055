"""One iteration of a method: all microbatches, data-parallel exchanges and the optimizer.

Legend: N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

# Returns the work of a layer and microbatch; None for dense layers.
WorkOf = Callable[[int, int], LayerWork | None]


@dataclass(frozen=True)
class Iteration:
    """Time of an iteration; `spent`, by kind and a mean over all ranks, adds up to `seconds`."""

    seconds: float
    spent: Mapping[str, float]


def run_iteration(method: Method, timing: Timing, work: WorkOf) -> Iteration:
    """Run one iteration through all stages."""
    run, rates, contention = timing.run, timing.rates, timing.rates.cluster.contention
    by_parts = method.schedule.by_parts
    hides = method.schedule.restores_ahead or by_parts
    stages = [
        Clocks(
            run.ranks,
            run.node_size,
            pace=slowest_pace(run.world),
            contention=contention.gemm - 1.0,
            stretch=contention.exchange if hides else 1.0,
            one_stream=method.one_stream,
        )
        for _ in range(run.stages)
    ]
    for clocks in stages:
        clocks.work("host", rates.gap_s)
        clocks.gathered_s = rates.gap_s
    passes = _Passes(method, timing, work)
    orders = [
        order(stage, run.stages, run.chunks, run.microbatches, by_parts=by_parts)
        for stage in range(run.stages)
    ]
    following = [passes.following(stage, of_stage) for stage, of_stage in enumerate(orders)]
    fetched: list[Flight | None] = [None] * run.stages

    def operate(stage: int, operations: Operations) -> None:
        begun = []
        for each in reversed(operations):
            place = each.chunk * run.stages + stage
            ends = place == run.stages * run.chunks - 1
            of = Pass(
                *(stages[stage], passes.layers(place, each.microbatch), method.schedule),
                *(fetched[stage], following[stage].get(each)),
                is_backward=not each.is_forward,
                head_s=timing.head_seconds()[not each.is_forward] if ends else 0.0,
                in_turn=len(operations) > 1,
            )
            begun.append(of.parts())
        fetched[stage] = run_passes(*begun)

    sweep(stages, orders, run.chunks, operate, timing.send_seconds())
    _finish(method, timing, stages)
    seconds = max(float(clocks.now_N.max()) for clocks in stages)
    spent = {
        kind: float(np.mean([clocks.spent[kind].mean() for clocks in stages])) for kind in KINDS
    }
    return Iteration(seconds, spent)


def _finish(method: Method, timing: Timing, stages: Sequence[Clocks]) -> None:
    run, rates = timing.run, timing.rates
    for stage, clocks in enumerate(stages):
        if not run.overlaps_data_parallel:
            layers = run.stage_layers(len(timing.model.layer_has_experts), stage)
            clocks.meet()
            exchanged = (data_parallel(method, timing, layer) for layer in layers)
            clocks.work("data_parallel", sum(map(sum, exchanged)))
        clocks.wait("data_parallel", clocks.scattered_s)
        clocks.meet()
    last_s = max(float(clocks.now_N.max()) for clocks in stages)
    latency_s = rates.collective_seconds(run.world, run.node_size)
    for stage, clocks in enumerate(stages):
        clocks.wait("pipeline", last_s)
        clocks.work("optimizer", _STEP_COLLECTIVES * latency_s)
        held = stage_state(timing.model, run, method, stage).optimizer / OPTIMIZER_BYTES
        clocks.work("optimizer", rates.memory_seconds(held * _MOVED_BYTES))
    end_s = max(float(clocks.now_N.max()) for clocks in stages)
    for clocks in stages:
        clocks.wait(WAITING, end_s)


def data_parallel(method: Method, timing: Timing, layer: int) -> tuple[float, float]:
    """Return the times of gathering a layer's parameters and of reducing its gradients, in a step.

    Dense ones go over the stage's data-parallel ranks, experts' over the ranks that hold the same.
    Without the distributed optimizer, gradients are all-reduced and no parameters are gathered.
    """
    model, run = timing.model, timing.run
    has_experts = model.layer_has_experts[layer]
    dense = model.layer_weights(has_experts) / run.tensor
    scatter_s, gather_s = _ring_seconds(timing, dense, run.data_parallel, run.tensor)
    if not has_experts:
        return gather_s, scatter_s
    experts = method.experts_held * model.expert_weights
    copies, stride = method.replicas * run.replicas, run.ranks // method.replicas
    of_experts = _ring_seconds(timing, experts, copies, stride)
    return gather_s + of_experts[1], scatter_s + of_experts[0]


def _ring_seconds(timing: Timing, weights: float, copies: int, stride: int) -> tuple[float, float]:
    """Return the times of exchanging the gradients of weights, and of gathering the weights."""
    run, rates = timing.run, timing.rates
    ring = copies, run.node_size, stride
    reduced_s = rates.ring_seconds(weights * GRADIENT_BYTES, *ring)
    if not run.shards_optimizer:
        return 2 * reduced_s, 0.0
    return reduced_s, rates.ring_seconds(weights * timing.model.bytes_per_element, *ring)


class _Passes:
    """Times of layers, kept for backward and for other microbatches with the same work."""

    def __init__(self, method: Method, timing: Timing, work: WorkOf) -> None:
        self._method, self._timing, self._work = method, timing, work
        run = timing.run
        self._by_place = run.layers_by_chunk(len(timing.model.layer_has_experts))
        self._kept: dict[tuple[int, int, bool, bool], LayerTimes] = {}

    def layers(self, place: int, microbatch: int) -> list[LayerTimes]:
        run = self._timing.run
        first, last = microbatch == 0, microbatch == run.microbatches - 1
        return [self._layer(layer, microbatch, first, last) for layer in self._by_place[place]]

    def following(self, stage: int, order: Sequence[Operations]) -> dict[Operation, Following]:
        """Return the layers that are fetched during operations, where chunks have MoE layers."""
        first_of: list[tuple[Operation, LayerTimes]] = []
        follows = self._method.schedule.restores_following and not self._timing.run.synchronises
        for each in chain.from_iterable(order) if follows else ():
            place = each.chunk * self._timing.run.stages + stage
            layers = [of for of in self.layers(place, each.microbatch) if of.moe is not None]
            if layers:
                first_of.append((each, layers[0 if each.is_forward else -1]))
        return {
            before: Following(layer, not after.is_forward, after.microbatch == before.microbatch)
            for (before, _), (after, layer) in pairwise(first_of)
        }

    def _layer(self, layer: int, microbatch: int, first: bool, last: bool) -> LayerTimes:
        work = self._work(layer, microbatch)
        key = layer, id(work), first, last
        if (found := self._kept.get(key)) is not None:
            return found
        timing, run = self._timing, self._timing.run
        gather_s = scatter_s = 0.0
        if run.overlaps_data_parallel:
            gather_s, scatter_s = data_parallel(self._method, timing, layer)
        holds = self._method.schedule.holds_step
        times = timing.layer(
            f"layer {layer + 1}",
            timing.model.layer_has_experts[layer],
            work,
            restores=first or not holds,
            restores_backward=not holds,
            reduces=last or not holds,
            gather_s=gather_s if first else 0.0,
            scatter_s=scatter_s if last else 0.0,
            by_parts=self._method.schedule.by_parts,
        )
        self._kept[key] = times
        return times
