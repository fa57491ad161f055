"""A `LayerState` is one MoE layer on this rank, as coordinator, scheduler and metrics know it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.collectives import LayoutTag
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.telemetry.statistics import Sample

# Microbatches per layer whose balance is reported. A sample: measuring all of a long log interval
# would hold up the step that logs.
_SAMPLES = 32


class LayerOwner(Protocol):
    """Is the MoE layer that a `LayerState` belongs to, with its experts and its dispatcher."""

    def what_changed(self) -> str | None:
        """Say what somebody changed in the experts since they were built; None if nothing."""
        ...

    def end_step(self) -> None:
        """Do what is left to do when a training step is over."""
        ...


@dataclass
class SentRows:
    """Counts rows of hidden states that this rank sent in dispatches, inside its node and beyond.

    Attributes:
        intra_bytes, inter_bytes: of these rows.
    """

    intra_rows: int = 0
    inter_rows: int = 0
    intra_bytes: int = 0
    inter_bytes: int = 0
    dispatches: int = 0

    def add(self, intra_rows: int, inter_rows: int, row_bytes: int) -> None:
        """Count one dispatch."""
        self.intra_rows += intra_rows
        self.inter_rows += inter_rows
        self.intra_bytes += intra_rows * row_bytes
        self.inter_bytes += inter_rows * row_bytes
        self.dispatches += 1


@dataclass
class LayerState:
    """Holds the state of one MoE layer on this rank.

    Attributes:
        index: among the layers of this rank, from 0.
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        number: the 3 of "layer 3".
        slices: what this rank holds of its experts.
        recomputes: whether the MoE layer is a checkpoint of its own.
        passes: that each microbatch makes through the layer: several where Megatron repeats it.
        owner: the layer.
        pending: plans whose forward ran without gradients, under a checkpoint; the re-runs take
            them. A list for each microbatch, oldest first: backward order of microbatches equals
            forward order per layer, in 1F1B and interleaved schedules alike. The passes of one
            microbatch feed each other, so that backward comes to the last one first.
        routed: passes of this step so far.
        planned: the layout that a pass was last planned with, as exchanges see it.
        sent: since somebody last asked (`take_sent`).
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    slices: Slices
    recomputes: bool
    passes: int
    owner: LayerOwner
    pending: deque[list[MicrobatchPlan]] = field(default_factory=deque)
    routed: int = 0
    planned: LayoutIndex | None = None
    sent: SentRows = field(default_factory=SentRows)
    _counts_NE: Int64 | None = None
    _samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    _tag: tuple[LayoutTag, torch.Tensor] | None = None

    @property
    def rerun(self) -> RestoredExperts | None:
        """Return the experts of the next re-run under a checkpoint, if one is to come."""
        return self.pending[0][-1].restored if self.pending else None

    def keep_for_rerun(self, plan: MicrobatchPlan) -> None:
        """Keep the plan of a first pass under a checkpoint."""
        if not self.pending or len(self.pending[-1]) == self.passes:
            self.pending.append([])
        self.pending[-1].append(plan)

    def plan_of_rerun(self) -> MicrobatchPlan | None:
        """Return the plan of this forward pass, if it is the re-run of a checkpoint.

        In the re-run of a checkpoint that has another one inside, the inner one runs without
        gradients once more, and its own re-run follows in the same backward pass.
        """
        if not self.pending:
            return None
        if not torch.is_grad_enabled():
            is_in_backward = torch._C._current_graph_task_id() != -1
            return self.pending[0][-1] if is_in_backward else None
        plan = self.pending[0].pop()
        if not self.pending[0]:
            self.pending.popleft()
        return plan

    def tag(self, version: int, layout: ExpertLayout, device: torch.device) -> torch.Tensor:
        """Return the tag of an exchange, which is uploaded once for as long as it holds."""
        tag = LayoutTag(version, layout.digest)
        if self._tag is None or self._tag[0] != tag:
            self._tag = (tag, tag.tensor(device))
        return self._tag[1]

    def next_microbatch(self, num_microbatches: int | None) -> int:
        """Return the number within the step, from 0, of the microbatch that is routed next.

        Megatron's rerun state machine repeats a step: after the last microbatch comes the first.
        """
        number = self.routed // self.passes
        return 0 if number == num_microbatches else number

    def count_pass(
        self, counts_NE: Int64, num_microbatches: int | None
    ) -> tuple[int, Int64] | None:
        """Count a routed pass.

        Returns:
            With a microbatch's last pass its number within the step, from 0, and the sum of the
            counts of its passes.
        """
        number, at = self.next_microbatch(num_microbatches), self.routed % self.passes
        self.routed = number * self.passes + at + 1
        before_NE, self._counts_NE = self._counts_NE, None
        summed_NE = counts_NE if at == 0 or before_NE is None else before_NE + counts_NE
        if at + 1 == self.passes:
            return number, summed_NE
        self._counts_NE = summed_NE
        return None

    def add_sample(self, sample: Sample) -> None:
        """Keep a decision for the metrics; the oldest one makes room."""
        self._samples.append(sample)

    def take_sent(self) -> SentRows:
        """Return what dispatches sent since the last call."""
        sent, self.sent = self.sent, SentRows()
        return sent

    def take_samples(self) -> list[Sample]:
        """Take the newest decisions since the last call, oldest first.

        Only the planner rank has any.
        """
        samples = list(self._samples)
        self._samples.clear()
        return samples


def name_of_layer(number: int, is_mtp: bool, taken: Sequence[str]) -> str:
    """Name a layer for seeds and messages, unlike the names that are taken.

    Hybrid models number the MTP layers of each depth from 1.
    """
    name = f"mtp {number}" if is_mtp else f"layer {number}"
    same = sum(other.split(" #")[0] == name for other in taken)
    return f"{name} #{same + 1}" if same else name


def frozen_in(layers: Sequence[LayerState]) -> str:
    """Name the layers with frozen matrices, and the positions of these, for ranks to compare."""
    frozen = {
        layer.name: sorted(set(range(len(layer.slices.rows))) - set(layer.slices.trained_at))
        for layer in layers
    }
    return ", ".join(f"{name}: {positions}" for name, positions in frozen.items() if positions)


def what_changed(layers: Sequence[LayerState]) -> str | None:
    """Say of the first layer with other experts than FSEP's what they are; None without any."""
    found = ((layer.name, layer.owner.what_changed()) for layer in layers)
    return next((f"{name}: {change}" for name, change in found if change), None)


def end_step(layers: Sequence[LayerState]) -> None:
    """End a step of the layers.

    Raises:
        RuntimeError: plans are left, or what a layer finds now.
    """
    check_no_plan_is_left(layers)
    for layer in layers:
        layer.owner.end_step()


def check_no_plan_is_left(layers: Sequence[LayerState]) -> None:
    """Raise if forward passes left plans.

    Raises:
        RuntimeError: naming the layers.
    """
    left = {layer.name: sum(map(len, layer.pending)) for layer in layers if layer.pending}
    if left:
        raise RuntimeError(
            f"FSEP: forward passes without gradients left plans that no re-run used: {left}. A "
            "forward in training mode under torch.no_grad() is taken for the first pass of a "
            "checkpoint; call model.eval() for passes that have no backward. Neither has a "
            "checkpoint whose inputs need no gradient, as after frozen embeddings: let the hidden "
            "states that enter the layers require one, or do not recompute these layers"
        )
