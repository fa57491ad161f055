"""Activities of a rank, by which it is measured and profiled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kind of an activity of compute, tokens or a communication stream."""

    STEP = "step"
    DENSE = "dense layers"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"
    RESTORE = "restore"
    CHANGE = "change"
    REDUCE = "reduce"
    EXCHANGES = "exchanges"  # of a calibration


@dataclass(frozen=True)
class Activity:
    """Key of measured times: an activity of one layer in one direction, or compute's wait for it.

    `layer` is empty for steps and dense layers. `inside_node` marks the second stage of a token
    exchange through nodes.
    """

    kind: Kind
    layer: str = ""
    backward: bool = False
    waits: bool = False
    inside_node: bool = False

    def __str__(self) -> str:
        label = f"{self.kind} {self.layer}" if self.layer else self.kind.value
        label += ", inside node" * self.inside_node + ", backward" * self.backward
        return "wait: " * self.waits + label
