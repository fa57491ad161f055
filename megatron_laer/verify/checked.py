"""Subjects of checks, and the text, error and exit status of a finding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from megatron_laer.planner.placed import Placed

# Differences in one message.
_SHOWN = 4
# Of a process that a finding ends. Neither Python nor a shell has a meaning for it.
STATUS = 86


class VerificationError(RuntimeError):
    """Weights, gradients or tokens that are wrong on some rank."""


@dataclass(frozen=True)
class Checked:
    """One use of an exchange in a layer.

    Attributes:
        layer: its name.
        direction: "forward" or "backward" for weights where compute reads them first; "reduce".
        number: among all of the layer in this direction in the step, from 0.
        way: name of the chain of holdings by which they went.
        sizes: R and K of each matrix.
        ranks: of the group, as the world numbers them.
    """

    layer: str
    direction: str
    number: int
    way: str
    placed: Placed
    sizes: Sequence[tuple[int, int]]
    ranks: Sequence[int]

    def __str__(self) -> str:
        return f"{self.layer}, {self.direction} {self.number + 1} of the step, by way {self.way}"

    def matrix(self, matrix: int, expert: int) -> str:
        rows, columns = self.sizes[matrix]
        number = f"{matrix + 1} of {len(self.sizes)}"
        return f"matrix {number} ({rows} x {columns}) of expert {expert}"

    def owner(self, expert: int) -> str:
        home_slots = self.placed.geometry.home_slots
        if not home_slots:
            return "all ranks' rows"
        return f"its home, rank {self.ranks[expert // home_slots]}"


def described(checked: Checked, found: Sequence[str]) -> str:
    """Return a text on the first differences."""
    more = len(found) - _SHOWN
    return f"{checked}: " + "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def end_with_status() -> None:
    """End the process with `STATUS` at a `VerificationError` that nothing catches.

    A batch system must not start the run again, as it may after other errors.
    """
    hook = sys.excepthook

    def ends(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        hook(kind, error, at)
        if isinstance(error, VerificationError):
            raise SystemExit(STATUS)

    sys.excepthook = ends
