"""State of one MoE layer on this rank: its experts, plans, counts and statistics.

With M microbatches `--fsep-restore step` lets a layer's exchanges fall from 3·M to 2, or to 3 where
payloads serve one direction. In return a rank holds the restored matrices of every layer, and
float32 sums of their gradients, as long as the step runs. With experts at home these are replicas;
the homes' own gradients are stock's, microbatch by microbatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.life import Kind, Kinds
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import Outcome
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.collectives import LayoutTag
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.planning.pass_layouts import LayerPass
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams

# Maximum microbatches per layer and balance report: more would delay the step that logs.
_OUTCOMES = 32


class RerunPlans:
    """Plans of forward passes without gradients, under a checkpoint, for their re-runs.

    One list per microbatch, in the order of forward and backward; each is used from its end.
    """

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._plans: deque[list[MicrobatchPlan]] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._plans))

    @property
    def next(self) -> MicrobatchPlan | None:
        return self._plans[0][-1] if self._plans else None

    def keep(self, plan: MicrobatchPlan) -> None:
        if not self._plans or len(self._plans[-1]) == self._passes:
            self._plans.append([])
        self._plans[-1].append(plan)

    def take(self) -> MicrobatchPlan | None:
        """Return the plan of this forward pass, if it is the re-run of a checkpoint.

        The inner one of nested checkpoints first re-runs without gradients, and keeps its plan.
        """
        plan = self.next
        if plan is None:
            return None
        if not torch.is_grad_enabled():
            is_in_backward = torch._C._current_graph_task_id() != -1
            return plan if is_in_backward else None
        self._plans[0].pop()
        if not self._plans[0]:
            self._plans.popleft()
        return plan


class LayerStatistics:
    """Measurements of one layer since the last report."""

    def __init__(self) -> None:
        self._outcomes: deque[Outcome] = deque(maxlen=_OUTCOMES)
        self._sent = np.zeros(5, dtype=np.int64)

    def add_outcome(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)

    def take_outcomes(self) -> list[Outcome]:
        outcomes = list(self._outcomes)
        self._outcomes.clear()
        return outcomes

    def add_sent(self, intra_rows: int, inter_rows: int, row_bytes: int) -> None:
        """Add the rows of tokens that this rank sent in a dispatch, in its node and beyond."""
        self._sent += intra_rows, inter_rows, intra_rows * row_bytes, inter_rows * row_bytes, 1

    def take_sent(self) -> Int64:
        """Return sums of rows in the node and beyond, of their bytes, and of dispatches."""
        sent, self._sent = self._sent, np.zeros_like(self._sent)
        return sent


@dataclass(eq=False, kw_only=True)
class LayerState:
    """One MoE layer on this rank, and its state.

    Attributes:
        index: among the layers of this rank, from 0.
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        number: the 3 of "layer 3".
        home: its experts in the order of their homes.
        find_share: called at the first use, when the model is complete.
        adapters: describes adapters of home experts, as they must be on all ranks.
        what_changed: describes changes to the experts since construction; None if there are none.
        on_step_end: called at the end of a training step.
        launch_kernels: called before the first step, to launch what the layer's own code launches.
        kinds: of the run.
        passes: of each microbatch through the layer; several where Megatron repeats it.
        quantised: whether home experts travel as payloads.
        delayed: for each pass whose input gradients are computed, oldest first, the function that
            `backward_dw` calls for those of the weights.
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    home: HomeOrder
    geometry: Geometry
    streams: ExchangeStreams
    device: torch.device
    kinds: Kinds
    find_share: Callable[[], Share]
    adapters: Callable[[], str]
    what_changed: Callable[[], str | None]
    on_step_end: Callable[[], None]
    launch_kernels: Callable[[], None]
    passes: int = 1
    quantised: bool = True
    delayed: deque[Callable[[], None]] = field(default_factory=deque)
    reruns: RerunPlans = field(init=False)
    statistics: LayerStatistics = field(default_factory=LayerStatistics)
    _routed: int = 0
    _num_microbatches: int | None = None
    _counts_NE: Int64 | None = None
    _tag: tuple[LayoutTag, torch.Tensor] | None = None
    _layout_index: LayoutIndex | None = None
    _held: RestoredExperts | None = None  # over a step

    def __post_init__(self) -> None:
        self.reruns = RerunPlans(self.passes)

    @cached_property
    def share(self) -> Share:
        return self.find_share()

    def begin_step(self, num_microbatches: int | None) -> None:
        self._routed, self._num_microbatches = 0, num_microbatches

    def begin_layout(self, layout: ExpertLayout, num_microbatches: int | None) -> None:
        """Upload a step's layout, and begin to hold the layer's experts if the run does."""
        index = self._index_of(layout)
        if Kind.STEP not in self.kinds:
            return
        if num_microbatches is None:
            raise ValueError(
                "--fsep-restore step must know the microbatches of a step: give "
                "training_step(step, num_microbatches), or take --fsep-restore layer"
            )
        if self._held is None:
            check_main_grads(self.name, self.share)
            self._held = self._experts(index, self.kinds)
        self._held.begin_step(index, num_microbatches * self.passes)

    def end_step(self) -> None:
        self.on_step_end()
        if self._held is not None:
            self._held.free()

    def experts_of_pass(self, layout: ExpertLayout, *, training: bool) -> RestoredExperts:
        """Return new restored experts, or in training those that are held over the step."""
        if training and self._held is not None:
            return self._held
        restored = self._experts(self._index_of(layout), self.kinds - {Kind.STEP})
        if not training:
            restored.expect_no_backward()
        return restored

    def _experts(self, index: LayoutIndex, kinds: Kinds) -> RestoredExperts:
        return RestoredExperts(self.name, self.share, index, self.streams, kinds, self.delayed)

    def _index_of(self, layout: ExpertLayout) -> LayoutIndex:
        index = self._layout_index
        if index is None or index.placed.layout != layout:
            index = layout_index(Placed(layout, self.geometry, self.quantised), self.device)
            self._layout_index = index
        return index

    def next_pass(self, *, training: bool) -> LayerPass:
        """Return the next pass; Megatron's rerun state machine repeats steps."""
        microbatch = self._routed // self.passes
        microbatch = 0 if microbatch == self._num_microbatches else microbatch
        return LayerPass(self.index, self._routed, microbatch, training)

    @property
    def begins_step(self) -> bool:
        """Whether the next pass is a step's first one, also of a repeated step."""
        return self.next_pass(training=True).microbatch == 0 and self._routed % self.passes == 0

    def count_pass(self, counts_NE: Int64) -> tuple[int, Int64] | None:
        """Count a routed pass; return a microbatch's number and total counts with its last pass."""
        microbatch, at = self.next_pass(training=True).microbatch, self._routed % self.passes
        self._routed = microbatch * self.passes + at + 1
        before_NE, self._counts_NE = self._counts_NE, None
        summed_NE = counts_NE if at == 0 or before_NE is None else before_NE + counts_NE
        if at + 1 == self.passes:
            return microbatch, summed_NE
        self._counts_NE = summed_NE
        return None

    def tag(self, version: int, layout: ExpertLayout) -> torch.Tensor:
        tag = LayoutTag(version, layout.digest)
        if self._tag is None or self._tag[0] != tag:
            self._tag = (tag, tag.tensor(self.device))
        return self._tag[1]


def name_of_layer(number: int, is_mtp: bool, taken: Sequence[str]) -> str:
    """Return a unique name for seeds and messages; MTP numbers repeat in hybrid models."""
    name = f"mtp {number}" if is_mtp else f"layer {number}"
    same = sum(other.split(" #")[0] == name for other in taken)
    return f"{name} #{same + 1}" if same else name


def frozen_in(layers: Sequence[LayerState]) -> str:
    frozen = {
        layer.name: sorted({*range(len(layer.share.sizes))} - {*layer.share.trained_at})
        for layer in layers
    }
    return ", ".join(f"{name}: {positions}" for name, positions in frozen.items() if positions)


def adapters_in(layers: Sequence[LayerState]) -> str:
    found = {layer.name: layer.adapters() for layer in layers}
    return ", ".join(f"{name}: {adapters}" for name, adapters in found.items() if adapters)


def what_changed(layers: Sequence[LayerState]) -> str | None:
    """Describe the first layer whose experts were replaced; None if none was."""
    found = ((layer.name, layer.what_changed()) for layer in layers)
    return next((f"{name}: {change}" for name, change in found if change), None)


def check_main_grads(name: str, share: Share) -> None:
    """Refuse to hold a step's sums without main gradients: a bfloat16 `grad` would round them."""
    if not share.have_main_grads:
        raise ValueError(
            f"--fsep-restore step, {name}: adds gradients to Megatron's main gradients, and "
            "these parameters have none; wrap the model in Megatron's DistributedDataParallel, "
            "or take --fsep-restore layer"
        )


def kept_problem(layers: Sequence[LayerState], kept_gib: float) -> str | None:
    """Describe why no layer's weights fit into the memory to keep them; None if they do."""
    if kept_gib == 0:
        return None
    sizes = [layer.share.restored_bytes(layer.geometry.replica_slots) for layer in layers]
    least = min(sizes, default=0)
    if kept_gib * 2**30 >= least:
        return None
    return (
        f"--fsep-restore {kept_gib}: keeps no layer's restored experts, which take "
        f"{least / 2**30:.6f} GiB; give as much for each layer and microbatch in flight, or "
        "leave it out"
    )


def check_no_plan_is_left(layers: Sequence[LayerState]) -> None:
    left = {layer.name: len(layer.reruns) for layer in layers if len(layer.reruns)}
    if left:
        raise RuntimeError(
            f"FSEP: forward passes without gradients left plans that no re-run used: {left}. A "
            "forward in training mode under torch.no_grad() is taken for the first pass of a "
            "checkpoint; call model.eval() for passes that have no backward. Neither has a "
            "checkpoint whose inputs need no gradient, as after frozen embeddings: let the hidden "
            "states that enter the layers require one, or do not recompute these layers"
        )
