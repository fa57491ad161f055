"""Megatron's combined 1F1B schedule runs layers in parts, and changes no bit of FSEP's results.

Its bounds against stock are in the table of parity. In bf16, which it needs, they would hide a
small part of a gradient.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest

from megatron_laer.runtime.operations import Operation, OperationOrder
from megatron_laer.schedule import Schedule
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.replay import train_row
from tests.parity.row import AT_HOME, HOMES
from tests.parity.rows import (
    BF16,
    COMBINED,
    DELAYED,
    DIST_OPT,
    EXACT,
    MTP,
    RANDOM,
    SCHEDULER_OFF,
    SHARED,
    STEP,
    VIRTUAL,
)
from tests.probes import running, watching

FSEP = BF16 + " --expert-parallel-mode fsep --fsep-sharding rows"
EARLY = " --ep-overlap-early-attn-memory-release"
EVALUATION = " --eval-interval 2 --eval-iters 1"

# Flags of both runs, the second of which has the combined schedule and its own flags.
CASES = {
    "rows, tokens once per rank": (
        RANDOM + SHARED + EVALUATION + " --fsep-token-exchange node",
        "",
    ),
    "experts at home, delayed weight gradients, both overlaps": (
        RANDOM + AT_HOME + DIST_OPT,
        DELAYED,
    ),
    "experts at home, fresh layouts, delayed weight gradients": (EXACT + HOMES, DELAYED + EARLY),
    "no overlap, delayed weight gradients": (RANDOM + SCHEDULER_OFF, DELAYED),
    "held over a step": (RANDOM + STEP, DELAYED),
    "virtual pipeline, multi-token prediction": (RANDOM + VIRTUAL + MTP, DELAYED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_combined_schedule_changes_no_bit(trained: Trainings, case: str) -> None:
    flags, more = CASES[case]
    size = 4 if VIRTUAL in flags else 2
    plain, combined = (
        trained(FSEP + flags + own, by=train_row, size=size, global_batch=4 * size)
        for own in ("", COMBINED + more)
    )
    assert identical(combined, plain)
    assert combined.eval_losses == plain.eval_losses


class Held(NamedTuple):
    """Maxima over a run of one rank, in passes of layers, and uses that had to fetch first.

    Attributes:
        weights: passes whose experts had memory at once.
        gradients: passes whose gradients of replicas had memory at once.
        late: uses of a matrix whose restore had not been started ahead.
        unfetched: operations, as `F0 1` of chunk and number, that were expected, and whose first
            experts had not been fetched when they began.
    """

    weights: int
    gradients: int
    late: int
    unfetched: set[str]


def held(command: list[str]) -> tuple[Held, Schedule, int]:
    """Return this rank's maxima, its schedule and its number of layers."""
    from megatron_laer.runtime.comm.buffers import BufferPool
    from megatron_laer.runtime.weights.slots import RestoredWeights

    most = Counter[BufferPool]()
    ran: Any = None
    late, unfetched = 0, set[str]()

    def take(pool: BufferPool, *_: Any) -> None:
        most[pool] = max(most[pool], pool.in_use + 1)

    def use(weights: RestoredWeights, *_: Any) -> None:
        nonlocal late, ran
        late += not weights.are_here
        ran = running()

    def begin(order: OperationOrder, of: Operation) -> None:
        expected = order.following(is_forward=of.is_forward) == of
        fetched = running().scheduler._fetched.get(order.order_of(is_forward=of.is_forward))
        placed = fetched and fetched[1].index.placed
        if expected and (not fetched or placed.has_replicas > fetched[1].weights.are_here):
            unfetched.add(f"{'BF'[of.is_forward]}{of.chunk} {of.number}")

    with watching(
        (BufferPool, "take", take),
        (RestoredWeights, "matrix", use),
        (OperationOrder, "_begin", begin),
    ):
        train_row(command)
    assert not any(pool.in_use for pool in most), "nothing outlives the run"
    found = Held(most[ran.streams.weights], most[ran.streams.grads], late, unfetched)
    return found, Schedule.of(ran.kinds), len(ran.layers)


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, " --num-layers 3"),
        (2, " --num-layers 1" + DELAYED),  # two microbatches are in one layer
        (2, " --num-layers 3 --fsep-capacity 8" + AT_HOME + DELAYED),
        (4, VIRTUAL),
    ],
    ids=["three layers", "one layer, delayed", "experts at home, delayed", "virtual pipeline"],
)
def test_three_layers_are_restored_at_most_and_one_waits_for_its_gradients(
    trained: Trainings, size: int, flags: str
) -> None:
    given = FSEP + RANDOM + flags + COMBINED
    for found, schedule, layers in trained.each(given, by=held, size=size, global_batch=4 * size):
        most = schedule.restored_layers(layers), schedule.gradient_layers(layers)
        assert found[:3] == (*most, 0)
        assert found.unfetched == {"F0 0", "B1 0" if flags == VIRTUAL else "B0 0"}
