"""Order of a step's operations: the forward and backward passes of microbatches through chunks.

A rank repeats the order of its last complete step with as many microbatches. So each operation but
the first is known while the one before runs. Megatron's schedules and own loops are alike here.
Where a forward and a backward run together, each direction has an order of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Operation(NamedTuple):
    """Forward or backward of one microbatch: the chunk's forward of this number in the step."""

    is_forward: bool
    chunk: int
    number: int


# Operations in order, by whether forwards are among them.
_Orders = Mapping[bool, Sequence[Operation]]


class OperationOrder:
    """Operations of the present step so far, and those that come next.

    With `by_direction` a forward and a backward run together, each in an order of its direction.
    After the first operation that was not expected, none is until the next step.
    """

    def __init__(self, *, by_direction: bool = False) -> None:
        self._by_direction = by_direction
        self._complete: dict[int, _Orders] = {}  # by number of microbatches
        self._microbatches = self._total = 0
        self._expected: _Orders = {}
        self._begun: defaultdict[bool, list[Operation]] = defaultdict(list)
        self._forwards: Counter[int] = Counter()

    def order_of(self, *, is_forward: bool) -> bool:
        """Return whether forwards are in the order of an operation of this direction."""
        return is_forward or not self._by_direction

    def following(self, *, is_forward: bool) -> Operation | None:
        """Return the operation that comes next in the order of this direction; None if unknown."""
        of = self.order_of(is_forward=is_forward)
        expected, at = self._expected.get(of, ()), len(self._begun[of])
        return expected[at] if at < len(expected) else None

    def begin_step(self, num_microbatches: int | None, num_chunks: int) -> None:
        """Begin a step; no operation is known if the number of microbatches is not."""
        self._microbatches = num_microbatches or 0
        self._total = 2 * self._microbatches * num_chunks
        self._expected = self._complete.get(self._microbatches, {})
        self._begun = defaultdict(list)
        self._forwards.clear()

    def end_step(self) -> None:
        if self._num_begun == self._total:
            self._complete[self._microbatches] = self._begun
        self.begin_step(None, 0)

    def begin_forward(self, chunk: int) -> Operation | None:
        """Begin a chunk's forward; None outside of steps, and in repetitions of a step's passes."""
        if self._num_begun >= self._total:
            return None
        number = self._forwards[chunk]
        self._forwards[chunk] += 1
        return self._begin(Operation(True, chunk, number))

    def begin_backward(self, forward: Operation) -> Operation:
        return self._begin(forward._replace(is_forward=False))

    def _begin(self, operation: Operation) -> Operation:
        if self.following(is_forward=operation.is_forward) != operation:
            self._expected = {}
        self._begun[self.order_of(is_forward=operation.is_forward)].append(operation)
        return operation

    @property
    def _num_begun(self) -> int:
        return sum(map(len, self._begun.values()))
