"""Megatron's pipeline schedules: 1F1B, and interleaved where a stage has several chunks.

A stage has a list of operations, two of which may run together. A sweep runs them as soon as their
stage is free and their inputs have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_laer.tools.simulator.iteration.clocks import Clocks, Seconds


@dataclass(frozen=True)
class Operation:
    """One pass of a microbatch through a chunk of a stage."""

    is_forward: bool
    chunk: int
    microbatch: int


# One operation, or a forward and a backward that run together.
Operations = tuple[Operation, ...]


def order(
    stage: int, stages: int, chunks: int, microbatches: int, *, by_parts: bool = False
) -> list[Operations]:
    """Return the operations of a stage: warm-up, one forward and one backward in turn, cool-down.

    With one chunk, warm-up is a forward per later stage. Interleaved, chunks take turns every p
    microbatches, and Megatron's warm-up is (p - 1 - stage) * 2 + (chunks - 1) * p forwards. With
    `by_parts` it is one more, so that a forward and a backward are independent and run together.
    """
    total = microbatches * chunks
    ahead = _ahead(stage, stages, chunks, microbatches, by_parts)

    def operation(number: int, is_forward: bool) -> Operation:
        if chunks == 1:
            return Operation(is_forward, 0, number)
        group, within = divmod(number, stages * chunks)
        chunk = within // stages
        microbatch = group * stages + within % stages
        return Operation(is_forward, chunk if is_forward else chunks - 1 - chunk, microbatch)

    found: list[Operations] = [(operation(number, True),) for number in range(ahead)]
    for number in range(total - ahead):
        both = operation(ahead + number, True), operation(number, False)
        found += [both] if by_parts else [(each,) for each in both]
    return found + [(operation(number, False),) for number in range(total - ahead, total)]


def in_flight(
    stage: int, stages: int, chunks: int, microbatches: int, *, by_parts: bool = False
) -> int:
    """Return the maximum number of passes whose activations a stage holds at once.

    It is reached by the first forward after warm-up. No order is made for it, which has an
    operation for each of any number of microbatches.
    """
    return min(_ahead(stage, stages, chunks, microbatches, by_parts) + 1, microbatches * chunks)


def _ahead(stage: int, stages: int, chunks: int, microbatches: int, by_parts: bool) -> int:
    """Return the number of forwards in warm-up."""
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = ahead * 2 + (chunks - 1) * stages
    return min(ahead + by_parts, microbatches * chunks)


def sweep(
    stages: Sequence[Clocks],
    orders: Sequence[Sequence[Operations]],
    chunks: int,
    run: Callable[[int, Operations], None],
    send_s: float,
) -> None:
    """Run all operations, each when its input has arrived from the stage before or after.

    `run` advances the clocks of a stage; sending takes `send_s`, during compute.
    """
    num_stages = len(stages)
    done: dict[tuple[bool, int, int], Seconds] = {}  # by direction, place and microbatch
    next_of = [0] * num_stages
    last_place = num_stages * chunks - 1

    def needed(stage: int, operation: Operation) -> tuple[bool, int, int] | None:
        place = operation.chunk * num_stages + stage
        if operation.is_forward:
            return (True, place - 1, operation.microbatch) if place > 0 else None
        if place == last_place:  # needs only its own forward, which is earlier in the order
            return None
        return (False, place + 1, operation.microbatch)

    def advance(stage: int) -> bool:
        """Run the ready operations of a stage, and return True if there were any."""
        began_at = next_of[stage]
        while next_of[stage] < len(orders[stage]):
            operations = orders[stage][next_of[stage]]
            keys = [key for of in operations if (key := needed(stage, of)) is not None]
            if any(key not in done for key in keys):
                break
            for key in keys:
                stages[stage].wait("pipeline", done.pop(key) + send_s)
            run(stage, operations)
            for operation in operations:
                place = operation.chunk * num_stages + stage
                is_last = place == (last_place if operation.is_forward else 0)
                if not is_last:
                    done[operation.is_forward, place, operation.microbatch] = stages[stage].now_N
            next_of[stage] += 1
        return next_of[stage] > began_at

    while any(advance(stage) for stage in range(num_stages)):
        pass
    assert all(number == len(of) for number, of in zip(next_of, orders, strict=True)), "a deadlock"
