"""Order of a step's operations: the forward and backward passes of microbatches through chunks.

A rank repeats the order of its last complete step with as many microbatches. So each operation but
the first is known while the one before runs. Megatron's schedules and own loops are alike here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Operation(NamedTuple):
    """Forward or backward of one microbatch: the chunk's forward of this number in the step."""

    is_forward: bool
    chunk: int
    number: int


class OperationOrder:
    """Operations of the present step so far, and the one that comes next.

    After the first operation that was not expected, none is until the next step.
    """

    def __init__(self) -> None:
        self._complete: dict[int, Sequence[Operation]] = {}  # by number of microbatches
        self._microbatches = self._total = 0
        self._expected: Sequence[Operation] = ()
        self._begun: list[Operation] = []
        self._forwards: Counter[int] = Counter()

    @property
    def following(self) -> Operation | None:
        at = len(self._begun)
        return self._expected[at] if at < len(self._expected) else None

    def begin_step(self, num_microbatches: int | None, num_chunks: int) -> None:
        """Begin a step; no operation is known if the number of microbatches is not."""
        self._microbatches = num_microbatches or 0
        self._total = 2 * self._microbatches * num_chunks
        self._expected = self._complete.get(self._microbatches, ())
        self._begun = []
        self._forwards.clear()

    def end_step(self) -> None:
        if len(self._begun) == self._total:
            self._complete[self._microbatches] = self._begun
        self.begin_step(None, 0)

    def begin_forward(self, chunk: int) -> Operation | None:
        """Begin a chunk's forward; None outside of steps, and in repetitions of a step's passes."""
        if len(self._begun) >= self._total:
            return None
        number = self._forwards[chunk]
        self._forwards[chunk] += 1
        return self._begin(Operation(True, chunk, number))

    def begin_backward(self, forward: Operation) -> Operation:
        return self._begin(forward._replace(is_forward=False))

    def _begin(self, operation: Operation) -> Operation:
        if self.following != operation:
            self._expected = ()
        self._begun.append(operation)
        return operation
