"""One MoE layer on this rank, as coordinator, scheduler and metrics know it.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.guard import Decision
from megatron_laer.runtime.comm.collectives import LayoutTag
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.runtime.weights.step_experts import StepExperts

# Microbatches per layer whose balance is reported.
_HISTORY = 32


@dataclass
class LayerState:
    """One MoE layer on this rank.

    Attributes:
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        slices: what this rank holds of its experts.
        recomputes: whether the MoE layer is a checkpoint of its own.
        pending: plans whose forward ran without gradients, under a checkpoint, oldest first; the
            re-run takes them. Backward order equals forward order per layer, in 1F1B and
            interleaved schedules alike.
        history: decisions on the newest microbatches since the metrics were last read, and the
            seconds that the host took for each, on the group's rank 0. A sample: measuring all of a
            long log interval would hold up the step that logs.
        step_experts: restored for the whole step, where the schedule holds it.
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    slices: Slices
    recomputes: bool
    layout: ExpertLayout
    pending: deque[MicrobatchPlan] = field(default_factory=deque)
    microbatches: int = 0
    step_counts_NE: npt.NDArray[np.int64] | None = None
    history: deque[tuple[Decision, float]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    tag: tuple[LayoutTag, torch.Tensor] | None = None
    step_experts: StepExperts | None = None

    @property
    def rerun(self) -> RestoredExperts | None:
        """The experts of the next re-run under a checkpoint, if one is to come."""
        return self.pending[0].restored if self.pending else None
