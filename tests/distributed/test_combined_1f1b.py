"""Megatron's combined 1F1B schedule runs layers in parts, and changes no bit of FSEP's results.

Its bounds against stock are in the table of parity. In bf16, which it needs, they would hide a
small part of a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record
from megatron_laer.schedule import make_schedule
from tests.parity.compare import identical
from tests.parity.flags import command_line
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

FSEP = BF16 + " --expert-parallel-mode fsep --fsep-sharding rows"
EARLY = " --ep-overlap-early-attn-memory-release"
EVALUATION = " --eval-interval 2 --eval-iters 1"
STEPS = 3

# Flags of both runs, the second of which has the combined schedule and its own flags.
CASES = {
    "rows": (RANDOM + SHARED + EVALUATION, ""),
    "experts at home, delayed weight gradients, both overlaps": (
        RANDOM + AT_HOME + DIST_OPT,
        DELAYED,
    ),
    "experts at home, fresh layouts, delayed weight gradients": (EXACT + HOMES, DELAYED + EARLY),
    "no overlap, delayed weight gradients": (RANDOM + SCHEDULER_OFF, DELAYED),
    "tokens once per rank": (RANDOM + " --fsep-token-exchange node", ""),
    "held over a step": (RANDOM + STEP, DELAYED),
    "virtual pipeline, multi-token prediction": (RANDOM + VIRTUAL + MTP, DELAYED),
}


def command_of(data: str, flags: str, ranks: int) -> list[str]:
    return command_line(data, FSEP + flags, global_batch=4 * ranks, steps=STEPS)


@pytest.mark.parametrize("case", CASES)
def test_the_combined_schedule_changes_no_bit(case: str, ranks: RankPools, text_data: str) -> None:
    flags, more = CASES[case]
    size = 4 if VIRTUAL in flags else 2

    def run(flags: str) -> Record:
        record: Record = ranks(size).run(train_row, command_of(text_data, flags, size))[0]
        return record

    plain, combined = run(flags), run(flags + COMBINED + more)
    assert identical(combined, plain)
    assert combined.eval_losses == plain.eval_losses


class Held(NamedTuple):
    """Maxima over a run of one rank, in passes of layers, and uses that had to fetch first.

    Attributes:
        weights: passes whose experts were restored at once.
        gradients: passes whose gradients of replicas were kept at once.
        late: uses of a matrix whose restore had not been started ahead.
    """

    weights: int
    gradients: int
    late: int


def held(command: list[str]) -> Held:
    from megatron_laer.runtime.weights.restored_weights import RestoredWeights
    from megatron_laer.runtime.weights.states import ExpertsState, GradState, WeightState

    present: dict[type, set[int]] = {WeightState: set(), GradState: set()}
    most = {WeightState: 0, GradState: 0}
    late = 0
    enter, matrix = ExpertsState.enter, RestoredWeights.matrix

    def observed_state(state: ExpertsState, to: Any) -> None:
        enter(state, to)
        passes = present[type(to)]
        is_over = to in (WeightState.SHARDED, GradState.NONE)
        (passes.discard if is_over else passes.add)(id(state))
        most[type(to)] = max(most[type(to)], len(passes))

    def observed_use(weights: RestoredWeights, position: int) -> torch.Tensor:
        nonlocal late
        late += weights.state.weights is WeightState.SHARDED
        return matrix(weights, position)

    with (
        mock.patch.object(ExpertsState, "enter", observed_state),
        mock.patch.object(RestoredWeights, "matrix", observed_use),
    ):
        train_row(command)
    assert not any(present.values()), "nothing outlives the run"
    return Held(most[WeightState], most[GradState], late)


@pytest.mark.parametrize("more", ["", DELAYED], ids=["at once", "delayed"])
@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, RANDOM + " --num-layers 3"),
        (2, RANDOM + " --num-layers 1"),  # two microbatches are in one layer
        (2, RANDOM + " --num-layers 3 --fsep-capacity 8" + AT_HOME),
        (4, RANDOM + VIRTUAL),
    ],
    ids=["three layers", "one layer", "experts at home", "virtual pipeline"],
)
def test_two_layers_are_restored_at_most_and_one_waits_for_its_gradients(
    size: int, flags: str, more: str, ranks: RankPools, text_data: str
) -> None:
    command = command_of(text_data, flags + COMBINED + more, size)
    for found in ranks(size).run(held, command):
        assert found == Held(weights=2, gradients=1, late=0)


def test_the_schedule_counts_what_is_held() -> None:
    schedule = make_schedule(overlaps=True, by_parts=True)
    assert [schedule.restored_layers(layers) for layers in (1, 2, 3)] == [2, 2, 2]
    assert [schedule.gradient_layers(layers) for layers in (1, 2, 3)] == [1, 1, 1]
    assert make_schedule(overlaps=False, by_parts=True).restored_layers(3) == 1
