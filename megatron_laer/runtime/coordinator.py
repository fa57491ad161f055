"""The layouts in force on this rank, and how they change: plans in, statistics out.

Holds `(version, layout)` per MoE layer and each layer's FIFO of plans. Chooses no layout
(`planner`), and neither moves weights (`exchange`) nor says when (`scheduler`).

Legend: N ranks, E experts, C slots per rank, S = N·C slots.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist

from megatron_laer.config import (
    EXACT,
    NODE,
    RANDOM_PLANNER,
    STEP_RESTORE,
    FSEPConfig,
)
from megatron_laer.layout import ExpertLayout, default_capacity
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.state import PlannerState
from megatron_laer.runtime.comm.collectives import (
    LayoutTag,
    PlannerStatus,
    broadcast_layouts,
    exchange_counts,
)
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.flat_exchange import FlatExchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.node_exchange import NodeExchange
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.planning.planner_rank import PlannerRank, naming_flag
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.scheduler import Scheduler
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.runtime.weights.step_experts import StepExperts, memory_held
from megatron_laer.schedule import make_schedule
from megatron_laer.telemetry.clock import make_clock
from megatron_laer.telemetry.ranges import make_ranges
from megatron_laer.telemetry.timeline import Timeline, timeline_path

logger = logging.getLogger(__name__)


_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Coordinator:
    """Layouts, plans and statistics of one FSEP group, on one of its ranks.

    Args:
        num_experts: E.
        seed: the run's seed; the same on every rank.
        costs: the planner's model of a layer's time.
    """

    def __init__(
        self,
        config: FSEPConfig,
        groups: FSEPGroups,
        num_experts: int,
        *,
        seed: int,
        costs: CostModel,
        device: torch.device,
    ) -> None:
        self.config = config
        self.groups = groups
        self.seed = seed
        self.device = device
        self.geometry = Geometry(
            num_ranks=groups.size,
            num_experts=num_experts,
            capacity=config.capacity or default_capacity(groups.size, num_experts),
            node_size=groups.node_size,
        )
        costs = costs.with_exchange(config.restore_algorithm, self.geometry)
        self.guard = Guard(
            config.mode, costs, self.geometry, config.imbalance_tolerance, config.split
        )
        self.exchange = _exchange(config, groups, costs.restore_algorithm)
        overlaps = config.scheduler == "on"
        self.schedule = make_schedule(
            overlaps=overlaps,
            after_gate=config.mode == EXACT,
            holds_step=config.restore == STEP_RESTORE,
        )
        self.streams = ExchangeStreams(
            self.exchange,
            parameters=make_comm_stream("parameters", device, overlaps=overlaps),
            gradients=make_comm_stream("gradients", device, overlaps=overlaps),
        )
        self.scheduler = Scheduler(self.schedule, self.streams, self._experts_of)
        self.layers: list[LayerState] = []
        self.version = 0
        self.step = 0
        self.planner_status = PlannerStatus()
        # Why the state of an earlier run is not gone on from.
        self.resume_problem: str | None = None
        self.timeline: Timeline | None = None
        self._unreported_steps = 0
        self._costs = costs
        self._num_microbatches: int | None = None
        self._started = False
        self._warned_without_steps = False
        self._planner_rank: PlannerRank | None = None
        self._resumed: PlannerState | None = None

    # What the layers call.

    def register_layer(
        self, number: int, is_mtp: bool, slices: Slices, *, recomputes: bool
    ) -> LayerState:
        """Add a MoE layer; every rank of the group adds the same ones in the same order.

        Args:
            number: 1-based, over the whole model.
            slices: what this rank holds of its experts.
            recomputes: whether it is a checkpoint of its own.
        """
        assert not self._started, "a layer was built after training began"
        shape = (self.geometry.num_ranks, self.geometry.capacity, self.geometry.num_experts)
        name = f"mtp {number}" if is_mtp else f"layer {number}"
        # Hybrid MTP numbers the layers of each depth from 1; seeds and messages need names apart.
        same = sum(layer.name.split(" #")[0] == name for layer in self.layers)
        if same:
            name += f" #{same + 1}"
        layout = ExpertLayout.static(*shape)
        state = LayerState(len(self.layers), name, number, is_mtp, slices, recomputes, layout)
        self.layers.append(state)
        return state

    def plan_microbatch(
        self, layer: LayerState, routing_map_TE: torch.Tensor, *, training: bool
    ) -> MicrobatchPlan:
        """The plan that this forward pass follows. Collective, but for the re-run of a checkpoint.

        A pass without gradients while training is the first one under a checkpoint: its plan is
        kept for the re-run, which exchanges nothing, decides nothing and records nothing.
        Evaluation leaves no trace.

        Args:
            routing_map_TE: bool [T, E], the router's choice.
        """
        if training and torch.is_grad_enabled() and layer.pending:
            return layer.pending.popleft()
        if training and not self._started:
            self._warn_without_steps()
        restored = self.scheduler.enter(layer, training)
        layout = restored.index.layout
        tag, tag_tensor = self._tag_of(layer, layout)
        counts_NE = exchange_counts(
            routing_map_TE.sum(dim=0), tag, tag_tensor, self.groups, layer.name
        )
        start_s = time.perf_counter()
        decision = self.guard.decide(counts_NE, layout)
        row_S = decision.quotas.rank_row(self.groups.rank)
        columns_NC = decision.quotas.rank_columns(self.groups.rank)
        solve_s = time.perf_counter() - start_s
        if decision.replanned:
            restored.change(layout_index(decision.layout, self.device))
        self.scheduler.decided(layer, restored)
        plan = MicrobatchPlan(
            restored=restored,
            row_S=row_S,
            columns_NC=columns_NC,
        )
        if training:
            self._record(layer, decision, solve_s)
            if not torch.is_grad_enabled():
                layer.pending.append(plan.for_rerun(routing_map_TE))
        return plan

    # What the training loop calls.

    def start(self, first_step: int) -> str | None:
        """Open the timeline; on the group's rank 0 also the planner, or the recordings.

        Returns:
            What went wrong, for the caller to raise on every rank of the world.
        """
        self._started = True
        self._go_on(first_step)
        try:
            self._open_timeline(first_step)
            if self.groups.rank == 0 and self.layers:
                self._planner_rank = PlannerRank(
                    self.config,
                    self.geometry,
                    self._costs,
                    self.layers,
                    group_index=self.groups.index,
                    first_step=first_step,
                    resumed=self._resumed,
                )
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return f"{type(error).__name__}: {error}"
        return None

    def begin_step(self, step: int, num_microbatches: int | None = None) -> None:
        """A step boundary: layouts that are due take effect. Collective over the group.

        Args:
            step: of the run, so that a resumed run goes on with the same numbers.
            num_microbatches: of this step; lets planning start while the last backward passes run.

        Raises:
            RuntimeError: plans of the step before were left over.
            ValueError: `--fsep-restore step` without a number of microbatches.
        """
        assert self._started, "begin_step before start"
        self._check_fifos()
        if self.timeline is not None:
            self.timeline.begin_step(step)
        self.step = step
        self._num_microbatches = num_microbatches
        for layer in self.layers:
            layer.microbatches = 0
            layer.step_counts_NE = None
        self._change_layouts()
        if self.schedule.holds_step:
            self._hold_experts()

    def end_step(self, *, weights_changed: bool) -> None:
        """The step's statistics are complete.

        Args:
            weights_changed: whether the optimizer made its step.

        Raises:
            RuntimeError: a layer's plans were not all used by a backward pass.
        """
        self._check_fifos()
        for layer in self.layers:
            if self._num_microbatches is None and layer.microbatches:
                self._observe(layer)
            if layer.step_experts is not None:
                layer.step_experts.end_step(weights_changed=weights_changed)
        self._unreported_steps += 1
        if self.timeline is not None:
            self.timeline.end_step(self.step)

    def take_exposed_ms(self) -> tuple[float, float]:
        """What the compute waited for restores and for gradients, per step since the last call."""
        steps, self._unreported_steps = max(1, self._unreported_steps), 0
        streams = self.streams
        return (
            streams.parameters.times.exposed.take_ms() / steps,
            streams.gradients.times.exposed.take_ms() / steps,
        )

    # What checkpoints call.

    @property
    def started(self) -> bool:
        """Whether training began, so that it is too late to resume."""
        return self._started

    @property
    def resumed_version(self) -> int | None:
        """The layout version of the earlier run's state that is gone on from, if there is one."""
        return None if self._resumed is None else self._resumed.version

    def planner_state(self) -> PlannerState | None:
        """The planner's state between two steps, on the group's rank 0; None without a planner.

        Waits for plans in the making.
        """
        planned = None if self._planner_rank is None else self._planner_rank.planned()
        if planned is not None:
            forecasts, plans = planned
            return PlannerState(
                next_step=self.step + 1,
                version=self.version,
                layers=tuple(layer.name for layer in self.layers),
                layouts=tuple(layer.layout for layer in self.layers),
                forecasts=forecasts,
                plans=plans,
            )
        return self._resumed  # loaded, and saved again before the first step

    def resume(self, state: PlannerState) -> None:
        """Go on from an earlier run's state, if the first step is the one it was saved for.

        The same on every rank of the group, before `start`.

        Raises:
            ValueError: a state of another run.
        """
        assert not self._started
        state.check_fits(self.geometry, [layer.name for layer in self.layers])
        self._resumed = state

    def close(self) -> None:
        """Stop the planner and the exchanges' streams, and close the recording and the timeline."""
        self.scheduler.close()
        if self.timeline is not None:
            self.timeline.close()
        if self._planner_rank is not None:
            self._planner_rank.close()

    # Inside.

    def _warn_without_steps(self) -> None:
        """Say once that training goes on without steps: a backward pass came before this forward.

        Evaluation has no backward pass, and what tries a model out has a single one.
        """
        trains = self.exchange.count.reduces > 0
        if trains and self.config.follows_steps and not self._warned_without_steps:
            self._warned_without_steps = True
            if self.groups.rank == 0 and self.groups.index == 0:  # it is so for all of them
                logger.warning(
                    "FSEP: training goes on without steps, so layouts stay as they are, nothing is "
                    "planned, replayed or recorded, and experts are restored layer by layer: enter "
                    "`with megatron_laer.training_step(step, num_microbatches, model):` around the "
                    "forward and backward passes and the optimizer's step, on every rank"
                )

    def _go_on(self, first_step: int) -> None:
        state = self._resumed
        if state is None:
            return
        if state.next_step != first_step:
            self._resumed = None
            self.resume_problem = (
                f"its state was saved before step {state.next_step} and training begins at step "
                f"{first_step}"
            )
            return
        self.version = state.version
        for layer, layout in zip(self.layers, state.layouts, strict=True):
            layer.layout = layout

    def _change_layouts(self) -> None:
        if not self._changes_layouts or not self.layers:
            return
        lead = self._planner_rank
        geometry = self.geometry
        layouts, self.planner_status = broadcast_layouts(
            None if lead is None else lead.due(self.step),
            PlannerStatus() if lead is None else lead.status,
            (geometry.num_ranks, geometry.capacity, geometry.num_experts),
            len(self.layers),
            self.groups,
            self.device,
        )
        if layouts is not None:
            self._apply(layouts)

    def _hold_experts(self) -> None:
        if self._num_microbatches is None:
            raise ValueError(
                "--fsep-restore step must know the microbatches of a step: give "
                "training_step(step, num_microbatches), or take --fsep-restore layer"
            )
        is_first = any(layer.step_experts is None for layer in self.layers)
        if is_first and self.groups.rank == 0:
            held = memory_held([layer.slices for layer in self.layers], self.geometry.capacity)
            logger.info("FSEP: %s", held)
        for layer in self.layers:
            index = self._index_of(layer, training=True)
            if layer.step_experts is None:
                layer.step_experts = StepExperts(layer.name, layer.slices, index, self.streams)
            layer.step_experts.begin_step(index, self._num_microbatches)

    @property
    def _changes_layouts(self) -> bool:
        return self.config.plans or self.config.replay_layouts is not None

    def _open_timeline(self, first_step: int) -> None:
        if self.config.timeline is None:
            return
        rank = dist.get_rank()
        path = timeline_path(self.config.timeline, rank)
        clock, ranges = make_clock(self.device), make_ranges(self.device)
        with naming_flag("timeline", self.config.timeline):
            self.timeline = Timeline(path, rank, clock, ranges, first_step)
        for stream in (self.streams.parameters, self.streams.gradients):
            stream.times.timeline = self.timeline

    def _apply(self, layouts: list[ExpertLayout]) -> None:
        self.version += 1
        for layer, layout in zip(self.layers, layouts, strict=True):
            layer.layout = layout
        if self._planner_rank is not None:
            self._planner_rank.applied(self.step, layouts)

    def _experts_of(self, layer: LayerState, training: bool) -> RestoredExperts:
        if training and layer.step_experts is not None:
            return layer.step_experts
        return RestoredExperts(
            layer.name, layer.slices, self._index_of(layer, training), self.streams
        )

    def _index_of(self, layer: LayerState, training: bool) -> LayoutIndex:
        """The layout that the layer's next pass is planned with."""
        layout = layer.layout
        if self.config.planner == RANDOM_PLANNER and training:
            layout = ExpertLayout.random(
                layout.num_ranks,
                layout.capacity,
                layout.num_experts,
                (self.seed, self.step, layer.index, self._draw_of(layer)),
            )
        return layout_index(layout, self.device)

    def _draw_of(self, layer: LayerState) -> int:
        """A random layout's number within the step."""
        return 0 if self.schedule.holds_step else layer.microbatches

    def _tag_of(self, layer: LayerState, layout: ExpertLayout) -> tuple[LayoutTag, torch.Tensor]:
        """The layout's tag, with its tensor kept on the device as long as it holds."""
        tag = LayoutTag(self.version, layout.digest)
        if layer.tag is None or layer.tag[0] != tag:
            layer.tag = (tag, tag.tensor(self.device))
        return layer.tag

    def _record(self, layer: LayerState, decision: Decision, solve_s: float) -> None:
        counts_NE = decision.quotas.counts_NE
        if layer.microbatches == self._num_microbatches:
            # Megatron's rerun state machine repeats a step: what counts is the last time.
            layer.microbatches, layer.step_counts_NE = 0, None
        if self._planner_rank is not None:
            self._planner_rank.routed(self.step, layer, counts_NE)
            layer.history.append((decision, solve_s))
        layer.microbatches += 1
        if layer.step_counts_NE is None:
            layer.step_counts_NE = counts_NE.copy()
        else:
            layer.step_counts_NE += counts_NE
        if layer.microbatches == self._num_microbatches:
            self._observe(layer)

    def _observe(self, layer: LayerState) -> None:
        if self._planner_rank is not None and layer.step_counts_NE is not None:
            self._planner_rank.observe(self.step, layer, layer.step_counts_NE)

    def _check_fifos(self) -> None:
        left = {layer.name: len(layer.pending) for layer in self.layers if layer.pending}
        if left:
            raise RuntimeError(
                f"FSEP: forward passes without gradients left plans that no re-run used: {left}. A "
                "forward in training mode under torch.no_grad() is taken for the first pass of a "
                "checkpoint; call model.eval() for passes that have no backward"
            )


def _exchange(config: FSEPConfig, groups: FSEPGroups, algorithm: str) -> Exchange:
    if algorithm == NODE:
        dtype = None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]
        return NodeExchange(groups, dtype)
    return FlatExchange(groups)


_coordinator: Coordinator | None = None


def set_coordinator(coordinator: Coordinator | None) -> None:
    """Install this process's coordinator; the one before is closed."""
    global _coordinator
    if _coordinator is not None:
        _coordinator.close()
    _coordinator = coordinator


def current_coordinator() -> Coordinator | None:
    """This process's coordinator, if an FSEP layer was built."""
    return _coordinator
