"""States of restored experts, and their transitions.

Weights and gradients have separate states: with `--fsep-restore step` the weights stay restored
while each microbatch's gradients come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WeightState(Enum):
    """Location of a layer's whole weights."""

    SHARDED = "nowhere: each rank has its share alone, and no memory is taken"
    RESTORING = "on their way"
    RESTORED = "in this rank's slots, where the experts use them"


class GradState(Enum):
    """Location of the gradients of a layer's whole weights."""

    NONE = "not computed yet, or already handed over to the parameters"
    DEFERRED = "computed, and kept until the tokens' gradients have arrived"
    SUMMED = "added to those of the step's earlier microbatches"
    REDUCING = "on their way to the ranks' shares, whose main gradients they are added to"


_FOLLOWING: dict[WeightState | GradState, set[WeightState] | set[GradState]] = {
    # A change of layout restores the weights again, even before they arrive.
    WeightState.SHARDED: {WeightState.RESTORING},
    WeightState.RESTORING: {WeightState.RESTORING, WeightState.RESTORED, WeightState.SHARDED},
    WeightState.RESTORED: {WeightState.RESTORING, WeightState.SHARDED},
    GradState.NONE: {GradState.DEFERRED, GradState.SUMMED, GradState.REDUCING},
    GradState.DEFERRED: {GradState.SUMMED, GradState.REDUCING},
    GradState.SUMMED: {GradState.DEFERRED, GradState.SUMMED, GradState.REDUCING},
    GradState.REDUCING: {GradState.NONE},
}


@dataclass
class ExpertsState:
    """Present states of a layer's experts."""

    name: str
    weights: WeightState = WeightState.SHARDED
    grads: GradState = GradState.NONE

    def enter(self, state: WeightState | GradState) -> None:
        """Change the state of the weights or the gradients to a permitted successor."""
        present = self.weights if isinstance(state, WeightState) else self.grads
        assert state in _FOLLOWING[present], f"{self.name}: {state} cannot follow {present}"
        if isinstance(state, WeightState):
            self.weights = state
        else:
            self.grads = state
