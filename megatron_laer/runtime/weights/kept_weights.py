"""Memory in which restored weights stay from a microbatch's forward to its backward."""

from __future__ import annotations

from typing import Protocol


class Kept(Protocol):
    """Weights that can be kept, and freed."""

    def free(self) -> None: ...


class KeptWeights:
    """Account of the weights that are kept, up to `most_bytes` in all.

    The first ones of a step that fit are kept, until their backward has used them. All ranks of a
    group keep the same ones, since sizes are equal.
    """

    def __init__(self, most_bytes: float) -> None:
        self._free_bytes = most_bytes
        self._kept: dict[Kept, int] = {}

    def take(self, weights: Kept, num_bytes: int) -> bool:
        """Return whether these weights fit; then they are kept until `give_back`."""
        if num_bytes > self._free_bytes:
            return False
        self._kept[weights] = num_bytes
        self._free_bytes -= num_bytes
        return True

    def give_back(self, weights: Kept) -> None:
        self._free_bytes += self._kept.pop(weights, 0)

    def release(self) -> None:
        """Free weights whose backward did not come."""
        for weights in [*self._kept]:
            weights.free()
