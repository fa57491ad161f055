"""The communication schedule says, as data, when experts are restored and gradients leave.

A schedule says at which point of a model chunk's forward or backward pass the exchange of which
layer starts, within one chunk only: it knows nothing of pipelines. Carrying it out is the
scheduler's (`runtime/weights/scheduler.py`); this file imports neither torch nor Megatron.

    forward   layer i:    attention  router  dispatch ┬ experts i ──────── combine
              parameters:                             └ restore i+1
    backward  layer i:    combine ┬ experts i ── dispatch ┬ attention ── combine ┬ experts i-1
              parameters:         └ restore i-1           │                      └ restore i-2
              gradients:                                  └ reduce i ─────────────────────┘

Source: the LAER-MoE paper's fine-grained schedule (arXiv 2602.11686), with parameters and gradients
on communicators of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SchedulePoint(Enum):
    """Names a point in a chunk's pass that every rank of the group reaches in the same order."""

    CHUNK_FORWARD = "a chunk's forward begins"
    DISPATCHED = "a layer's tokens arrived, its experts are about to compute"
    CHUNK_BACKWARD = "a chunk's backward begins"
    COMBINE_GRADIENT = "the gradient of a layer's output arrived, its experts' backward begins"


class Target(Enum):
    """Names an MoE layer of the chunk, in forward order."""

    FIRST = "the chunk's first"
    NEXT = "the one after"
    LAST = "the chunk's last"
    PREVIOUS = "the one before"


@dataclass(frozen=True)
class Schedule:
    """Says what starts when.

    Attributes:
        restores: at which point the restore of which layer starts. A layer that no rule started
            is restored when its experts compute.
        delays_gradients: whether a layer's gradients travel while the backward of the layer before
            runs, or are waited for at once.
        holds_step: whether experts stay restored, and gradients are summed, over a whole step.
    """

    restores: tuple[tuple[SchedulePoint, Target], ...]
    delays_gradients: bool
    holds_step: bool = False

    def target(self, point: SchedulePoint) -> Target | None:
        """Return the layer to restore at this point, if any."""
        return dict(self.restores).get(point)

    def restored_layers(self, num_layers: int) -> int:
        """Return how many of a rank's layers have restored experts in memory at once, at most.

        A chunk looks one layer ahead; where there are several chunks, one is at work at a time.
        """
        looks_ahead = any(target in (Target.NEXT, Target.PREVIOUS) for _, target in self.restores)
        return num_layers if self.holds_step else min(2 if looks_ahead else 1, num_layers)

    def gradient_layers(self, num_layers: int) -> int:
        """Return the same for gradients of restored experts, in the dtype of their compute.

        A schedule that holds a step has sums of all layers beside them, in float32.
        """
        return min(2 if self.delays_gradients and not self.holds_step else 1, num_layers)


_FORWARD = ((SchedulePoint.CHUNK_FORWARD, Target.FIRST), (SchedulePoint.DISPATCHED, Target.NEXT))
_BACKWARD = (
    (SchedulePoint.CHUNK_BACKWARD, Target.LAST),
    (SchedulePoint.COMBINE_GRADIENT, Target.PREVIOUS),
)


def make_schedule(
    *, overlaps: bool, after_gate: bool = False, holds_step: bool = False
) -> Schedule:
    """Make the schedule for a way of running.

    Args:
        overlaps: whether exchanges run beside the compute at all.
        after_gate: every layout is made after the gate, so forward has nothing to restore ahead.
        holds_step: experts are restored once per step, so backward has nothing to restore.
    """
    if not overlaps:
        return Schedule((), delays_gradients=False, holds_step=holds_step)
    forward = () if after_gate else _FORWARD
    backward = () if holds_step else _BACKWARD
    return Schedule((*forward, *backward), delays_gradients=True, holds_step=holds_step)
