"""A `LayerState` is one MoE layer on this rank, as coordinator, scheduler and metrics know it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.guard import Decision
from megatron_laer.runtime.comm.collectives import LayoutTag
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import Slices

# Microbatches per layer whose balance is reported. A sample: measuring all of a long log interval
# would hold up the step that logs.
_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Sample:
    """Holds a decision on one microbatch, and the seconds that the host took for it."""

    decision: Decision
    decide_s: float


@dataclass
class LayerState:
    """Holds the state of one MoE layer on this rank.

    Attributes:
        index: among the layers of this rank, from 0.
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        number: the 3 of "layer 3".
        slices: what this rank holds of its experts.
        recomputes: whether the MoE layer is a checkpoint of its own.
        changed: tells what somebody changed in its experts since they were built.
        pending: plans whose forward ran without gradients, under a checkpoint, oldest first; the
            re-run takes them. Backward order equals forward order per layer, in 1F1B and
            interleaved schedules alike.
        microbatches: that were routed in this step so far.
        planned: the layout that a pass was last planned with, as exchanges see it.
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    slices: Slices
    recomputes: bool
    changed: Callable[[], str | None]
    pending: deque[MicrobatchPlan] = field(default_factory=deque)
    microbatches: int = 0
    planned: LayoutIndex | None = None
    _samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    _tag: tuple[LayoutTag, torch.Tensor] | None = None

    @property
    def rerun(self) -> RestoredExperts | None:
        """Return the experts of the next re-run under a checkpoint, if one is to come."""
        return self.pending[0].restored if self.pending else None

    def tag(self, version: int, layout: ExpertLayout, device: torch.device) -> torch.Tensor:
        """Return the tag of an exchange, which is uploaded once for as long as it holds."""
        tag = LayoutTag(version, layout.digest)
        if self._tag is None or self._tag[0] != tag:
            self._tag = (tag, tag.tensor(device))
        return self._tag[1]

    def count_microbatch(self, num_microbatches: int | None) -> int:
        """Count a routed microbatch and return its number within the step, from 0.

        Megatron's rerun state machine repeats a step: after the last microbatch comes the first.
        """
        number = 0 if self.microbatches == num_microbatches else self.microbatches
        self.microbatches = number + 1
        return number

    def add_sample(self, decision: Decision, decide_s: float) -> None:
        """Keep a decision for the metrics; the oldest one makes room."""
        self._samples.append(Sample(decision, decide_s))

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
    found = ((layer.name, layer.changed()) for layer in layers)
    return next((f"{name}: {change}" for name, change in found if change), None)


def check_no_plan_is_left(layers: Sequence[LayerState]) -> None:
    """Raise if forward passes left plans.

    Raises:
        RuntimeError: naming the layers.
    """
    left = {layer.name: len(layer.pending) for layer in layers if layer.pending}
    if left:
        raise RuntimeError(
            f"FSEP: forward passes without gradients left plans that no re-run used: {left}. A "
            "forward in training mode under torch.no_grad() is taken for the first pass of a "
            "checkpoint; call model.eval() for passes that have no backward. Neither has a "
            "checkpoint whose inputs need no gradient, as after frozen embeddings: let the hidden "
            "states that enter the layers require one, or do not recompute these layers"
        )
