"""The communication schedule: when experts are restored and gradients leave, as data.

It covers one model chunk's forward and backward passes and knows nothing of pipelines. The
scheduler (`runtime/scheduler.py`) carries it out; this file imports neither torch nor Megatron.

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


@dataclass(frozen=True)
class Schedule:
    """Rules for the exchanges of one chunk; each moment comes in one order on all ranks of a group.

    A layer that no rule restored is restored when its experts compute.

    Attributes:
        restores_first: the chunk's first MoE layer, when the chunk's forward begins.
        restores_next: the layer after, when a layer's tokens have arrived.
        restores_last: the chunk's last layer, when the chunk's backward begins.
        restores_previous: the layer before, when the gradient of a layer's output has arrived.
        delays_gradients: a layer's gradients travel during the backward of the layer before,
            instead of being waited for at once.
        holds_step: experts stay restored, and gradients are summed, over a whole step.
    """

    restores_first: bool
    restores_next: bool
    restores_last: bool
    restores_previous: bool
    delays_gradients: bool
    holds_step: bool = False

    @property
    def restores_ahead(self) -> bool:
        """Whether any rule restores a layer ahead of its compute."""
        return self.restores_first or self.restores_last

    def restored_layers(self, num_layers: int) -> int:
        """Return how many of a rank's layers have restored experts in memory at once, at most.

        A chunk looks one layer ahead; where there are several chunks, one is at work at a time.
        """
        looks_ahead = self.restores_next or self.restores_previous
        return num_layers if self.holds_step else min(2 if looks_ahead else 1, num_layers)

    def gradient_layers(self, num_layers: int) -> int:
        """Return the same for gradients of restored experts, in the dtype of their compute.

        A schedule that holds a step also has float32 sums of all layers.
        """
        return min(2 if self.delays_gradients and not self.holds_step else 1, num_layers)


def make_schedule(
    *, overlaps: bool, after_gate: bool = False, holds_step: bool = False
) -> Schedule:
    """Make the schedule for a way of running.

    Args:
        overlaps: exchanges run during the compute.
        after_gate: every layout is made after the gate, so forward restores nothing ahead.
        holds_step: experts are restored once per step, so backward restores nothing.
    """
    forward, backward = overlaps and not after_gate, overlaps and not holds_step
    return Schedule(forward, forward, backward, backward, overlaps, holds_step)
