"""Overlaps of a kind of run and memory that they take, as simulations count them.

Training looks up the same cells of `life.py`. This file imports neither torch nor Megatron.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_laer.life import Action, Event, Kind, column


@dataclass(frozen=True)
class Schedule:
    """Overlaps of the exchanges of a rank's chunks in a run of some kinds.

    A layer that is not restored ahead is restored when its experts compute. If payloads serve one
    direction, each layer's first backward fetches its own without overlap.

    Attributes:
        holds_step: whether experts are restored once per step.
        by_parts: whether a forward and a backward run together, in parts of layers.
        restores_forward: whether forward restores layers ahead: a chunk's first, and each next one.
        restores_backward: whether backward does: a chunk's last, and each one before.
        restores_following: whether an operation's last layer restores the first one of the next.
        delays_gradients: whether gradients leave during the backward of the layer before.
    """

    holds_step: bool
    by_parts: bool
    restores_forward: bool
    restores_backward: bool
    restores_following: bool
    delays_gradients: bool

    @classmethod
    def of(cls, kinds: Collection[Kind]) -> Schedule:
        life = column(frozenset(kinds))
        prepared = life[Event.PREPARED]
        return cls(
            holds_step=Kind.STEP in kinds,
            by_parts=Kind.PARTS in kinds,
            restores_forward=Action.RESTORE in prepared,
            restores_backward=bool(life[Event.CHUNK_BACKWARD]),
            restores_following=bool(life[Event.LAST_LAYER]),
            delays_gradients=Action.MAKE_WAIT in prepared,
        )

    @property
    def restores_ahead(self) -> bool:
        return self.restores_forward or self.restores_backward

    def restored_layers(self, num_layers: int) -> int:
        """Return the maximum number of a rank's layers with restored experts in memory at once.

        Schedules look one layer ahead, also into the next operation, and one of several chunks is
        at work at a time. A layer that follows itself takes no second place. Of two operations that
        run together one has two layers while its experts compute, and then the other has one.
        """
        if self.holds_step:
            return num_layers
        most = min(2 if self.restores_ahead else 1, num_layers)
        return most + (self.by_parts and self.restores_ahead)

    def gradient_layers(self, num_layers: int) -> int:
        """Return the same maximum for gradients of restored experts, in their compute dtype.

        A schedule that holds a step also has float32 sums of all layers.
        """
        follow = self.delays_gradients and not self.holds_step and not self.by_parts
        return min(2 if follow else 1, num_layers)
