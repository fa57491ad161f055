"""Communication schedule, as data: the moments when experts are restored and gradients leave.

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
    """Rules for the exchanges of one chunk, in one order on all ranks of a group.

    A layer that no rule restored is restored when its experts compute.

    Attributes:
        restores_first: restore the chunk's first MoE layer when the chunk's forward begins.
        restores_next: restore the next layer when a layer's tokens have arrived.
        restores_last: restore the chunk's last layer when the chunk's backward begins.
        restores_previous: restore the layer before when the gradient of a layer's output arrives.
        delays_gradients: send a layer's gradients during the backward of the layer before;
            otherwise wait for them at once.
        holds_step: keep experts restored, and sum gradients, over a whole step.
    """

    restores_first: bool
    restores_next: bool
    restores_last: bool
    restores_previous: bool
    delays_gradients: bool
    holds_step: bool = False

    @property
    def restores_ahead(self) -> bool:
        return self.restores_first or self.restores_last

    def restored_layers(self, num_layers: int) -> int:
        """Return the maximum number of a rank's layers with restored experts in memory at once.

        Schedules look one layer ahead, and one of several chunks is at work at a time.
        """
        looks_ahead = self.restores_next or self.restores_previous
        return num_layers if self.holds_step else min(2 if looks_ahead else 1, num_layers)

    def gradient_layers(self, num_layers: int) -> int:
        """Return the same maximum for gradients of restored experts, in their compute dtype.

        A schedule that holds a step also has float32 sums of all layers.
        """
        return min(2 if self.delays_gradients and not self.holds_step else 1, num_layers)


def make_schedule(
    *, overlaps: bool, after_gate: bool = False, holds_step: bool = False
) -> Schedule:
    """Make the schedule for a way of running.

    With `after_gate`, every layout is made after the gate, so forward restores nothing ahead. With
    `holds_step`, experts are restored once per step, so backward restores nothing.
    """
    forward, backward = overlaps and not after_gate, overlaps and not holds_step
    return Schedule(forward, forward, backward, backward, overlaps, holds_step)
