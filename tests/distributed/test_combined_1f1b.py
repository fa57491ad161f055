"""Megatron's combined 1F1B schedule runs layers in parts, and changes no bit of FSEP's results.

Its bounds against stock are in the table of parity. In bf16, which it needs, they would hide a
small part of a gradient.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest

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
    """

    weights: int
    gradients: int
    late: int


def held(command: list[str]) -> Held:
    from megatron_laer.runtime.comm.buffers import BufferPool
    from megatron_laer.runtime.weights.slots import RestoredWeights

    most = Counter[BufferPool]()
    streams: Any = None
    late = 0

    def take(pool: BufferPool, *_: Any) -> None:
        most[pool] = max(most[pool], pool.in_use + 1)

    def use(weights: RestoredWeights, _position: int) -> None:
        nonlocal late, streams
        late += not weights.are_here
        streams = running().streams

    with watching((BufferPool, "take", take), (RestoredWeights, "matrix", use)):
        train_row(command)
    assert not any(pool.in_use for pool in most), "nothing outlives the run"
    return Held(most[streams.weights], most[streams.grads], late)


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
def test_two_layers_are_restored_at_most_and_one_waits_for_its_gradients(
    trained: Trainings, size: int, flags: str
) -> None:
    given = FSEP + RANDOM + flags + COMBINED
    for found in trained.each(given, by=held, size=size, global_batch=4 * size):
        assert found == Held(weights=2, gradients=1, late=0)
