"""Planner of each forward pass of a layer on one rank, from all ranks' counts.

Legend: N ranks, E experts, T tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.guard import Decision
from megatron_laer.planner.outcome import Outcome
from megatron_laer.runtime.comm.collectives import (
    CountsExchange,
    TokenSizesExchange,
    decision_digest,
)
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.metrics_recorder import MetricsRecorder
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.pair_counts import PairCounts
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce
from megatron_laer.runtime.planning.pass_layouts import PassLayouts
from megatron_laer.runtime.scheduler import Scheduler
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slots import ExchangeStreams

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class MicrobatchPlanner:
    """Planner of the passes of one rank's layers.

    `token_sizes` exchanges row numbers where tokens go through nodes. `needs_steps` says whether
    settings need step boundaries and no warning has said so, and `in_steps` whether the first step
    has begun.
    """

    groups: FSEPGroups
    device: torch.device
    streams: ExchangeStreams
    layouts: LayoutsInForce
    pass_layouts: PassLayouts
    scheduler: Scheduler
    recorder: MetricsRecorder
    pairs: PairCounts
    token_sizes: TokenSizesExchange | None
    needs_steps: bool
    in_steps: bool = False
    _last_decision: int = 0

    def __post_init__(self) -> None:
        self._counts = CountsExchange(self.groups, self.device)

    def start_pass(
        self,
        layer: LayerState,
        routing_map_TE: torch.Tensor,
        counts_E: torch.Tensor,
        *,
        training: bool,
        has_rerun: bool = True,
    ) -> Callable[[], MicrobatchPlan]:
        """Start to plan this forward pass. Collective, except in the re-run of a checkpoint.

        A training pass without gradients is the first one under a checkpoint. Its plan is kept for
        the re-run, which exchanges, decides and records nothing. Evaluation has no side effects.

        Args:
            routing_map_TE: bool [T, E], the router's choice.
            counts_E: int64 [E], this rank's tokens per expert.
            has_rerun: false where the layer is a checkpoint whose input needs no gradient.

        Returns:
            A function that waits for all ranks' counts and plans. Call it before the next plan is
            started, after work that can overlap is enqueued.
        """
        assert not torch.cuda.is_current_stream_capturing(), (
            "a CUDA graph is being captured where a microbatch is planned: layouts and split sizes "
            "are decided on the host, which a graph cannot record; give --cuda-graph-impl none"
        )
        if training and (plan := layer.reruns.take()) is not None:
            return lambda: plan
        if training and not self.in_steps:
            self._warn_without_steps()
        if training:
            self.pairs.add(layer.index, routing_map_TE, begins=layer.begins_step)
        restored = self.scheduler.enter(layer, training)
        read_counts = self._counts.start(
            counts_E,
            routing_map_TE,
            layer.tag(self.layouts.version, restored.index.placed.layout),
            self._last_decision,
            layer.name,
        )
        if not has_rerun:
            restored.expect_no_backward()
        rerun_map_TE = routing_map_TE if has_rerun else None
        return partial(self._plan, layer, restored, read_counts, rerun_map_TE, training=training)

    def _plan(
        self,
        layer: LayerState,
        restored: RestoredExperts,
        read_counts: Callable[[], Int64],
        rerun_map_TE: torch.Tensor | None,
        *,
        training: bool,
    ) -> MicrobatchPlan:
        counts_NE = read_counts()
        self.streams.parameters.go_on()  # a restore started before the previous layer's experts
        start_s = time.perf_counter()
        decision = self.pass_layouts.decide(
            layer.next_pass(training=training), counts_NE, restored.index.placed.layout
        )
        self._last_decision = decision_digest(decision.layout, solved=decision.solved)
        decide_s = time.perf_counter() - start_s
        if decision.replanned:
            placed = replace(restored.index.placed, layout=decision.layout)
            restored.change(layout_index(placed, self.device))
        self.scheduler.decided(restored)
        plan = MicrobatchPlan(restored, decision.rank_quotas, rows=int(counts_NE.sum()))
        if training:
            self._note(layer, counts_NE, decision, decide_s)
            if rerun_map_TE is not None and not torch.is_grad_enabled():
                restored.expect_rerun()
                layer.reruns.keep(plan.for_rerun(rerun_map_TE))
        return plan

    def _note(
        self, layer: LayerState, counts_NE: Int64, decision: Decision, decide_s: float
    ) -> None:
        microbatch = layer.count_pass(counts_NE)
        if self.layouts.planner_rank is not None:
            outcome = Outcome(decision, decide_s)
            layer.statistics.add_outcome(outcome)
            self.recorder.add(layer.index, outcome)
            if microbatch is not None:
                self.layouts.planner_rank.put(layer.index, *microbatch)

    def _warn_without_steps(self) -> None:
        """Warn once about training without steps, which a backward before this forward reveals."""
        if not self.needs_steps or not self.streams.exchange.count.backwards:
            return
        self.needs_steps = False
        if self.groups.rank == 0 and self.groups.index == 0:  # the same on all ranks
            logger.warning(
                "FSEP: training goes on without steps, so layouts stay as they are, nothing is "
                "planned or recorded, and experts are restored layer by layer: enter "
                "`with megatron_laer.training_step(step, num_microbatches, model):` around the "
                "forward and backward passes and the optimizer's step, on every rank"
            )
