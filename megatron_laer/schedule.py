"""Communication schedule, as data: the moments when experts are restored and gradients leave.

It covers operations, which are forward or backward passes of a microbatch through a model chunk,
and the step from one to the next. The scheduler (`runtime/scheduler.py`) carries it out; this file
imports neither torch nor Megatron.

    forward   layer i:    attention  router  dispatch ┬ experts i ──────── combine
              parameters:                             └ restore i+1
    backward  layer i:    combine ┬ experts i ── dispatch ┬ attention ── combine ┬ experts i-1
              parameters:         └ restore i-1           │                      └ restore i-2
              gradients:                                  └ reduce i ─────────────────────┘

In the last layer of an operation, the first one of the next operation takes the place of i+1 or
i-1. If it is the same layer, its weights stay, and only slots that differ are fetched.

Megatron's combined 1F1B schedule runs a forward and a backward operation layer by layer together.
Then restores i+1 and i-1 start as soon as experts i have computed. So each of the two operations
has the restored experts of one layer in memory.

Source: the LAER-MoE paper's fine-grained schedule (arXiv 2602.11686), with parameters and gradients
on communicators of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rules for the exchanges of a rank's chunks, in one order on all ranks of a group.

    A layer that no rule restored is restored when its experts compute.

    Attributes:
        restores_first: restore the chunk's first MoE layer when the chunk's forward begins.
        restores_next: restore the next layer when a layer's tokens have arrived.
        restores_last: restore the chunk's last layer when the chunk's backward begins.
        restores_previous: restore the layer before when the gradient of a layer's output arrives.
        delays_gradients: send a layer's gradients during the backward of the layer before;
            otherwise wait for them at once.
        holds_step: keep experts restored, and sum gradients, over a whole step.
        restores_following: apply `restores_first` and `restores_last` in the last layer of the
            operation before, where that is known.
        by_parts: two operations run together, in parts of layers.
    """

    restores_first: bool
    restores_next: bool
    restores_last: bool
    restores_previous: bool
    delays_gradients: bool
    holds_step: bool = False
    restores_following: bool = False
    by_parts: bool = False

    @property
    def restores_ahead(self) -> bool:
        return self.restores_first or self.restores_last

    def restored_layers(self, num_layers: int) -> int:
        """Return the maximum number of a rank's layers with restored experts in memory at once.

        Schedules look one layer ahead, also into the next operation, and one of several chunks is
        at work at a time. A layer that follows itself takes no second place. Two operations that
        run together may have one each of the same layer.
        """
        if self.holds_step:
            return num_layers
        most = 2 if self.restores_next or self.restores_previous else 1
        return most if self.by_parts else min(most, num_layers)

    def gradient_layers(self, num_layers: int) -> int:
        """Return the same maximum for gradients of restored experts, in their compute dtype.

        A schedule that holds a step also has float32 sums of all layers.
        """
        follow = self.delays_gradients and not self.holds_step and not self.by_parts
        return min(2 if follow else 1, num_layers)


def make_schedule(
    *,
    overlaps: bool,
    after_gate: bool = False,
    holds_step: bool = False,
    restores_following: bool = False,
    by_parts: bool = False,
) -> Schedule:
    """Make the schedule for a way of running.

    With `after_gate`, every layout is made after the gate, so forward restores nothing ahead. With
    `holds_step`, experts are restored once per step, so backward restores nothing. If it needs them
    in another form, as in mxfp8, each layer's first backward fetches that without overlap.
    """
    forward, backward = overlaps and not after_gate, overlaps and not holds_step
    following = overlaps and restores_following and not by_parts
    return Schedule(forward, forward, backward, backward, overlaps, holds_step, following, by_parts)
