"""Tests of kernels that need a card run on the labelled device, so that they follow the code."""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda.device import observed
from tests.fake_cuda.kernels import interpreted
from tests.gpu import test_kernels as on_card

pytestmark = pytest.mark.races

_PLACES = on_card.test_places_of_tokens_are_those_of_the_cpu_and_the_same_every_time.__name__
CASES = [
    (on_card.test_sums_over_replicas_are_bitwise_the_same_every_time.__name__, ""),
    (_PLACES, "slot_map"),
]


def run(name: str, given: str) -> list[str]:
    with observed(interpreted) as device:
        getattr(on_card, name)(*([getattr(on_card, given)] if given else []))
    return device.checker.races


@pytest.mark.parametrize(("name", "given"), CASES)
def test_a_test_for_a_card_passes_on_the_labelled_device(
    ranks: RankPools, name: str, given: str
) -> None:
    assert ranks(1).run(run, name, given) == [[]]
