"""Overlaps of a kind of run and memory that they take, as simulations count them.

Training looks up the same cells of `life.py`. This file imports neither torch nor Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.life import Action, Event, Kind, Kinds, column


@dataclass(frozen=True)
class Schedule:
    """Overlaps of the exchanges of a rank's chunks in a run of these kinds.

    A layer that is not restored ahead is restored when its experts compute.
    """

    kinds: Kinds

    @property
    def restores_forward(self) -> bool:
        """Return whether forward restores layers ahead: the chunk's first, and each next one."""
        return Action.RESTORE in column(self.kinds)[Event.PREPARED]

    @property
    def restores_backward(self) -> bool:
        """Return whether backward restores layers ahead: the chunk's last, and each one before.

        What is held over a step is restored once. If payloads serve one direction, each layer's
        first backward fetches its own without overlap.
        """
        return bool(column(self.kinds)[Event.CHUNK_BACKWARD])

    @property
    def restores_following(self) -> bool:
        """Return whether an operation's last layer restores the first one of the next."""
        return bool(column(self.kinds)[Event.LAST_LAYER])

    @property
    def restores_ahead(self) -> bool:
        return self.restores_forward or self.restores_backward

    @property
    def delays_gradients(self) -> bool:
        """Return whether gradients leave during the backward of the layer before."""
        return Action.MAKE_WAIT in column(self.kinds)[Event.PREPARED]

    @property
    def holds_step(self) -> bool:
        return Kind.STEP in self.kinds

    @property
    def by_parts(self) -> bool:
        return Kind.PARTS in self.kinds

    def restored_layers(self, num_layers: int) -> int:
        """Return the maximum number of a rank's layers with restored experts in memory at once.

        Schedules look one layer ahead, also into the next operation, and one of several chunks is
        at work at a time. A layer that follows itself takes no second place. Two operations that
        run together may have one each of the same layer.
        """
        if self.holds_step:
            return num_layers
        most = 2 if self.restores_ahead else 1
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
    found = {
        Kind.ALONE: not overlaps,
        Kind.FRESH: after_gate,
        Kind.STEP: holds_step,
        Kind.PARTS: by_parts,
        Kind.SYNCHRONISED: not restores_following,
    }
    return Schedule(frozenset(kind for kind, holds in found.items() if holds))
