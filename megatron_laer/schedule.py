"""When experts are restored and gradients leave: the communication schedule, as data.

A schedule says at which moment of a model chunk's forward or backward pass the exchange of which
layer starts, within one chunk only: it knows nothing of pipelines. Carrying it out is the
scheduler's (`runtime/scheduler.py`); this file imports neither torch nor Megatron.

    forward   layer i:    attention  router  dispatch ┬ experts i ──────── combine
              parameters:                             └ restore i+1
    backward  layer i:    combine ┬ experts i ──┬ dispatch  attention ── combine ┬ experts i-1
              parameters:         └ restore i-1 │                                └ restore i-2
              gradients:                        └ reduce i ───────────────────────────────┘

Source: the LAER-MoE paper's fine-grained schedule (arXiv 2602.11686), with parameters and gradients
on communicators of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Moment(Enum):
    """A point in a chunk's pass that every rank of the group reaches in the same order."""

    CHUNK_FORWARD = "a chunk's forward begins"
    DISPATCHED = "a layer's tokens arrived, its experts are about to compute"
    CHUNK_BACKWARD = "a chunk's backward begins"
    COMBINE_GRADIENT = "the gradient of a layer's output arrived, its experts' backward begins"


class Target(Enum):
    """Which MoE layer of the chunk, in forward order."""

    FIRST = "the chunk's first"
    NEXT = "the one after"
    LAST = "the chunk's last"
    PREVIOUS = "the one before"


@dataclass(frozen=True)
class Schedule:
    """What starts when.

    Attributes:
        restores: at which moment the restore of which layer starts. A layer that no rule started
            is restored when its experts compute.
        delays_gradients: whether a layer's gradients travel while the backward of the layer before
            runs, or are waited for at once.
    """

    restores: tuple[tuple[Moment, Target], ...]
    delays_gradients: bool

    def target(self, moment: Moment) -> Target | None:
        """The layer to restore at this moment, if any."""
        return dict(self.restores).get(moment)

    @property
    def restored_layers(self) -> int:
        """Layers of a chunk whose restored experts may be alive at once."""
        looks_ahead = any(target in (Target.NEXT, Target.PREVIOUS) for _, target in self.restores)
        return 2 if looks_ahead else 1

    @property
    def gradient_layers(self) -> int:
        """Layers whose gradients of restored experts may be alive at once."""
        return 2 if self.delays_gradients else 1


UNSCHEDULED = Schedule(restores=(), delays_gradients=False)
_BACKWARD = ((Moment.CHUNK_BACKWARD, Target.LAST), (Moment.COMBINE_GRADIENT, Target.PREVIOUS))
SCHEDULED = Schedule(
    restores=((Moment.CHUNK_FORWARD, Target.FIRST), (Moment.DISPATCHED, Target.NEXT), *_BACKWARD),
    delays_gradients=True,
)
# Where the layout is made after the gate, there is nothing to restore ahead in forward.
SCHEDULED_AFTER_GATE = Schedule(restores=_BACKWARD, delays_gradients=True)
