"""Layers of two ranks on the labelled device, and deliberate faults that it must find."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.entered import naming_a_card
from tests.fake_cuda.allowed import DOWNLOAD, IN_FLOAT64, split
from tests.fake_cuda.fault import ONE_QUEUE, read
from tests.fake_cuda.kernels import WRITES
from tests.fake_cuda.layers import CASES, train, watch

pytestmark = pytest.mark.races

FAULTS = read(Path(__file__).with_name("faults.txt"))
_launched: set[str] = set()
_entered: set[str] = set()


@pytest.mark.parametrize("case", CASES)
def test_layers_compute_the_cpus_bits_without_a_race_and_wait_for_counts_alone(
    case: str, ranks: RankPools
) -> None:
    on_cpu = ranks(2).run(train, case)
    on_card = [one for one_queue in (False, True) for one in ranks(2).run(watch, case, one_queue)]
    for watched, digests in zip(on_card, 2 * on_cpu, strict=True):
        assert watched.races == watched.held_up == []
        assert watched.operations > 500 and watched.frees > 50
        allowed, _ = split(watched.found)
        assert allowed - {IN_FLOAT64} == {
            DOWNLOAD
        }  # sums of `--fsep-set verify` are compared after a step
        assert watched.results == digests
        assert watched.compiled_in_steps == []
        _launched.update(watched.launches)
        _entered.update(watched.entered)


# Functions of the flex dispatcher, of NCCL's groups over nodes, and of metrics.
_ELSEWHERE = {
    "megatron_laer/layer/dispatch/flex.py:SlotFlexDispatcher.token_dispatch",
    "megatron_laer/runtime/comm/process_groups.py:ranks_per_node",
    "megatron_laer/telemetry/clock.py:StreamClock.catch_up",
    "megatron_laer/telemetry/rank_memory.py:memory_use",
}


def test_every_kernel_was_launched_and_every_function_that_names_a_card_was_entered() -> None:
    """This rests on the test before."""
    assert _launched == set(WRITES)
    folders = "layer/dispatch", "runtime/comm", "runtime/weights", "telemetry"
    named = naming_a_card(*(f"megatron_laer/{folder}" for folder in folders))
    assert named - _entered == _ELSEWHERE


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_its_place(name: str, ranks: RankPools) -> None:
    fault = FAULTS[name]
    if fault.misfit() is not None:
        return  # `test_planted.py` fails
    for watched in ranks(2).run(watch, fault.case, ONE_QUEUE in fault.words, fault):
        assert any(fault.found in text for text in watched.report()), watched
