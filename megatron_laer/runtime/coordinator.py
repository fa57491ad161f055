"""The coordinator plans each microbatch on one rank, and leads the rank's layers through steps.

It holds the FIFO of plans of each layer. It chooses no layout (`planner`) and keeps none
(`planning.layouts_in_force`), moves no weights (`comm`), does not say when they move
(`weights.scheduler`), and is put together elsewhere (`build`).

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from megatron_laer.arrays import Int64
from megatron_laer.config import FSEPConfig, PlanMode
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import agreement
from megatron_laer.runtime.comm.collectives import (
    CountsExchange,
    TokenSizesExchange,
    decision_digest,
)
from megatron_laer.runtime.comm.exchange import HierarchicalExchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.layer_state import (
    LayerOwner,
    LayerState,
    check_no_plan_is_left,
    end_step,
    frozen_in,
    name_of_layer,
    what_changed,
)
from megatron_laer.runtime.measurements import Measurements
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.planning.announced_layouts import AnnouncedLayouts
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer_experts import LayerExperts
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.scheduler import Chunk, Scheduler
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.runtime.weights.step_experts import memory_held
from megatron_laer.schedule import Schedule
from megatron_laer.telemetry.statistics import Sample

logger = logging.getLogger(__name__)


class Coordinator:
    """Leads the layers of one rank of an FSEP group.

    Args:
        guard: chooses each microbatch's layout; its cost model is the planner's as well.
        schedule: what `streams` do when.
        seed: the run's seed; the same on every rank.
        priced: the routing by which tokens are priced, for the recording of metrics.

    Attributes:
        layouts: those in force, which change at step boundaries.
        announced: those of announced microbatches; None in other plan modes.
        layers: this rank's MoE layers, in the order in which they were built.
        token_sizes: where tokens go through nodes.
        measurements: timeline and recording of metrics, open once training has begun.
    """

    def __init__(
        self,
        config: FSEPConfig,
        groups: FSEPGroups,
        geometry: Geometry,
        guard: Guard,
        schedule: Schedule,
        streams: ExchangeStreams,
        *,
        token_sizes: TokenSizesExchange | None = None,
        seed: int,
        device: torch.device,
        priced: Mapping[str, int],
    ) -> None:
        self.config = config
        self.groups = groups
        self.geometry = geometry
        self.guard = guard
        self.schedule = schedule
        self.streams = streams
        self.token_sizes = token_sizes
        self.experts = LayerExperts(streams)
        self.scheduler = Scheduler(schedule, streams, self._experts_of, self._before_forward)
        costs = guard.costs
        self.layouts = LayoutsInForce(config, groups, geometry, costs, seed=seed, device=device)
        self.announced: AnnouncedLayouts | None = None
        if config.mode == PlanMode.ANNOUNCED:
            self.announced = AnnouncedLayouts(guard, groups, device)
        self.seed = seed
        self.device = device
        self.layers: list[LayerState] = []
        self.step = 0
        self.measurements = Measurements(config, groups, guard, streams, priced)
        self._num_microbatches: int | None = None
        self._started = False
        self._counts = CountsExchange(groups, device)
        self._last_decision = 0
        self._unreported_steps = 0
        self._warned_without_steps = False

    @property
    def exchange(self) -> HierarchicalExchange:
        """Return the exchange of weights and gradients."""
        return self.streams.exchange

    # What the layers call.

    def register_layer(
        self,
        number: int,
        is_mtp: bool,
        slices: Slices,
        *,
        recomputes: bool,
        passes: int,
        owner: LayerOwner,
    ) -> LayerState:
        """Add a MoE layer; every rank of the group adds the same ones in the same order.

        Args:
            number: 1-based, over the whole model.
            slices: what this rank holds of its experts.
            recomputes: whether it is a checkpoint of its own.
            passes: that each microbatch makes through it.
            owner: the layer.
        """
        assert not self._started, "a layer was built after training began"
        name = name_of_layer(number, is_mtp, [layer.name for layer in self.layers])
        state = LayerState(
            len(self.layers), name, number, is_mtp, slices, recomputes, passes, owner
        )
        self.layouts.add_layer(name)
        self.layers.append(state)
        return state

    def start_plan(
        self,
        layer: LayerState,
        routing_map_TE: torch.Tensor,
        *,
        training: bool,
        has_rerun: bool = True,
    ) -> Callable[[], MicrobatchPlan]:
        """Start to plan this forward pass. Collective, except in the re-run of a checkpoint.

        A pass without gradients while training is the first one under a checkpoint: its plan is
        kept for the re-run, which exchanges nothing, decides nothing and records nothing.
        Evaluation leaves no trace.

        Args:
            routing_map_TE: bool [T, E], the router's choice.
            has_rerun: false where the layer is a checkpoint whose input needs no gradient.

        Returns:
            A function that waits for everybody's counts and plans: to be called once all is
            enqueued that the device can do meanwhile, and before the next plan is started.
        """
        assert not torch.cuda.is_current_stream_capturing(), (
            "a CUDA graph is being captured where a microbatch is planned: layouts and split sizes "
            "are decided on the host, which a graph cannot record; give --cuda-graph-impl none"
        )
        if training and (plan := layer.plan_of_rerun()) is not None:
            return lambda: plan
        if training and not self._started:
            self._warn_without_steps()
        restored = self.scheduler.enter(layer, training)
        tag_2 = layer.tag(self.layouts.version, restored.index.layout, self.device)
        read_counts = self._counts.start(
            routing_map_TE.sum(dim=0), tag_2, self._last_decision, layer.name
        )
        if not has_rerun:
            restored.expect_no_backward()
        return partial(
            self._plan,
            layer,
            restored,
            read_counts,
            routing_map_TE,
            training=training,
            has_rerun=has_rerun,
        )

    def _plan(
        self,
        layer: LayerState,
        restored: RestoredExperts,
        read_counts: Callable[[], Int64],
        routing_map_TE: torch.Tensor,
        *,
        training: bool,
        has_rerun: bool,
    ) -> MicrobatchPlan:
        """Plan a forward pass whose counts are on their way."""
        counts_NE = read_counts()
        start_s = time.perf_counter()
        decision = self._decide(layer, counts_NE, restored.index.layout, training=training)
        self._last_decision = decision_digest(decision.layout, solved=decision.solved)
        decide_s = time.perf_counter() - start_s
        if decision.replanned:
            restored.change(layout_index(decision.layout, self.device))
        self.scheduler.decided(layer, restored)
        plan = MicrobatchPlan(restored=restored, quotas=decision.rank_quotas)
        if training:
            self._note(layer, counts_NE, decision, decide_s)
            if has_rerun and not torch.is_grad_enabled():
                layer.keep_for_rerun(plan.for_rerun(routing_map_TE))
        return plan

    # What the training loop calls.

    def start(self, first_step: int) -> str | None:
        """Open the timeline; on the planner rank also the planner and the recordings.

        Before that, the ranks compare what they decide by. Collective over the group.

        Returns:
            What went wrong, for the caller to raise on every rank of the world.
        """
        self._started = True
        summary = agreement.summarise(self.config, self.geometry, self.guard.costs, self.seed)
        summary["frozen experts"] = frozen_in(self.layers)
        problem = agreement.difference(summary, self.groups) or what_changed(self.layers)
        if problem is not None:
            return problem
        if self.schedule.holds_step and self.groups.rank == 0:
            held = memory_held([layer.slices for layer in self.layers], self.geometry.capacity)
            logger.info("FSEP: %s", held)
        try:
            names = [layer.name for layer in self.layers]
            self.measurements.start(names, first_step, self.device)
            self.layouts.start(first_step)
        except (ValueError, OSError) as error:
            return str(error)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            logger.exception("FSEP: planner and recordings could not be opened")
            return f"{type(error).__name__}: {error}"
        return None

    def begin_step(self, step: int, num_microbatches: int | None = None) -> None:
        """Begin a step: layouts that are due take effect. Collective over the group.

        Args:
            step: of the run, so that a resumed run goes on with the same numbers.
            num_microbatches: of this step; lets planning start while the last backward passes run.

        Raises:
            RuntimeError: plans of the step before were left over.
            ValueError: `--fsep-restore step` without a number of microbatches; with
                `--fsep-plan-mode announced` as `AnnouncedLayouts.begin_step`.
        """
        assert self._started, "begin_step before start"
        check_no_plan_is_left(self.layers)
        self.measurements.begin_step(step)
        self.step = step
        self._num_microbatches = num_microbatches
        for layer in self.layers:
            layer.routed = 0
        self.layouts.begin_step(step, num_microbatches)
        if self.announced is not None:
            # Each microbatch has a layout of its own, and many are still being solved.
            self._num_microbatches = self.announced.begin_step(
                step, num_microbatches, len(self.layers), self.scheduler.replays_routing
            )
            return
        indexes = [(layer, self._index_of(layer, training=True)) for layer in self.layers]
        for layer, index in indexes:
            # What forward needs on the device of planned layouts is uploaded now.
            layer.tag(self.layouts.version, index.layout, self.device)
            self.exchange.prepare_restore(index)
            self.exchange.prepare_reduce(index)
        if self.schedule.holds_step:
            self.experts.begin_step(indexes, num_microbatches)

    def end_step(self, *, weights_changed: bool) -> None:
        """End a step, whose statistics are complete.

        Args:
            weights_changed: whether the optimizer made its step.

        Raises:
            RuntimeError: plans that no backward pass used, or tokens in other slots than planned.
        """
        end_step(self.layers)
        self.layouts.end_step()
        self.experts.end_step(weights_changed=weights_changed)
        self._unreported_steps += 1
        self.measurements.end_step(self.step, self.layouts.status, self.layouts.version)

    def take_exposed_ms(self) -> tuple[float, float]:
        """Return how long compute waited for restores and gradients, per step, since last asked."""
        steps, self._unreported_steps = max(1, self._unreported_steps), 0
        restores, reduces = self.streams.parameters.times, self.streams.gradients.times
        return restores.exposed.take_ms() / steps, reduces.exposed.take_ms() / steps

    # What checkpoints call.

    def save_planner(self, directory: str, storage: Any) -> None:
        """Write the planner's state into a checkpoint: see `planner_checkpoint.save_state`."""
        self.layouts.save(directory, storage)

    def resume_planner(self, directory: str, storage: Any) -> None:
        """Go on from the planner's state in a checkpoint: see `LayoutsInForce.resume`.

        Does nothing once training has begun. Collective over the group.
        """
        if self.layers and not self._started:
            self.layouts.resume(directory, storage)

    def close(self) -> None:
        """Stop the planner and the streams, and close the recordings and the timeline."""
        self.scheduler.close()
        self.measurements.close()
        if self.announced is not None:
            self.announced.close()
        self.layouts.close()

    # Inside.

    def _warn_without_steps(self) -> None:
        """Say once that training goes on without steps: a backward pass came before this forward.

        Evaluation has no backward pass, and what tries a model out has a single one.
        """
        trains = self.exchange.count.backwards > 0
        if trains and self.config.follows_steps and not self._warned_without_steps:
            self._warned_without_steps = True
            if self.groups.rank == 0 and self.groups.index == 0:  # it is so for all of them
                logger.warning(
                    "FSEP: training goes on without steps, so layouts stay as they are, nothing is "
                    "planned, replayed or recorded, and experts are restored layer by layer: enter "
                    "`with megatron_laer.training_step(step, num_microbatches, model):` around the "
                    "forward and backward passes and the optimizer's step, on every rank"
                )

    def _before_forward(self, chunk: Chunk) -> None:
        """Take what routers are told to choose in a chunk's forward, unless it was announced."""
        if self.announced is not None and self._started and chunk.module.training and chunk.layers:
            layers: Any = chunk.layers  # the coordinator's own
            passes = [
                (layer.index, layer.next_microbatch(self._num_microbatches)) for layer in layers
            ]
            self.announced.begin_pass(passes, chunk.replayed() if chunk.replayed else None)

    def _experts_of(self, layer: LayerState, training: bool) -> RestoredExperts:
        return self.experts.of_pass(layer, self._index_of(layer, training), training=training)

    def _index_of(self, layer: LayerState, training: bool) -> LayoutIndex:
        """Return the layout that the layer's next pass is planned with, as exchanges see it."""
        if (ahead := self._announced_for(layer, training)) is not None:
            layout = ahead.layout
        else:
            draw = 0 if self.schedule.holds_step else layer.routed
            layout = self.layouts.of_pass(layer.index, draw, training=training)
        if layer.planned is None or layer.planned.layout != layout:
            layer.planned = layout_index(layout, self.device)
        return layer.planned

    def _announced_for(self, layer: LayerState, training: bool) -> Decision | None:
        """Return what was decided ahead on the layer's next pass, waiting for it."""
        if self.announced is None or not training or not self._started:
            return None
        return self.announced.of_pass(layer.index, layer.next_microbatch(self._num_microbatches))

    def _decide(
        self, layer: LayerState, counts_NE: Int64, planned: ExpertLayout, *, training: bool
    ) -> Decision:
        ahead = self._announced_for(layer, training)
        if self.announced is not None and ahead is not None:
            return self.announced.decide(ahead, counts_NE)
        return self.guard.decide(counts_NE, planned, self.groups.rank)

    def _note(
        self, layer: LayerState, counts_NE: Int64, decision: Decision, decide_s: float
    ) -> None:
        """Count a pass; on the planner rank, also hand on what planner and metrics need."""
        microbatch = layer.count_pass(counts_NE, self._num_microbatches)
        if self.layouts.mailbox is not None:
            sample = Sample(decision, decide_s)
            layer.add_sample(sample)
            self.measurements.add(layer.index, sample)
            if microbatch is not None:
                self.layouts.mailbox.put(layer.index, *microbatch)
