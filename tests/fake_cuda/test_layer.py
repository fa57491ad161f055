"""One layer of two ranks on the labelled device, and deliberate faults that it must find."""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda import kernels, layer
from tests.fake_cuda.allowed import DOWNLOAD, split
from tests.fake_cuda.faults import COMPILED, FAULTS, RACE
from tests.fake_cuda.layer import CASES

pytestmark = pytest.mark.races

_launched: set[str] = set()


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_the_cpus_bits_and_waits_for_counts_alone(
    case: str, one_queue: bool, ranks: RankPools
) -> None:
    on_cpu = ranks(2).run(layer.train, case)
    on_card = ranks(2).run(layer.watch, case, one_queue)
    for (watched, digests), expected in zip(on_card, on_cpu, strict=True):
        assert watched.races == []
        assert split(watched.found)[0] == {DOWNLOAD}
        assert digests == expected
        assert watched.compiled_in_steps == {}
        _launched.update(watched.launches)


def test_every_kernel_was_launched() -> None:
    """This rests on the test before."""
    assert _launched == set(kernels.WRITES)


@pytest.mark.counts(card_faults=1)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_its_place(name: str, ranks: RankPools) -> None:
    fault = FAULTS[name]
    for watched, error in ranks(1).run(layer.watch_fault, name):
        if fault.kind == RACE:
            found = [race for race in watched.races if fault.place in race]
        elif fault.kind == COMPILED:
            found = [name for name in watched.compiled_in_steps if name == fault.place]
        else:
            found = [
                finding
                for finding in watched.found
                if finding.kind == fault.kind and fault.place in finding.place
            ]
        assert found, (watched, error)


def test_there_are_a_dozen_faults() -> None:
    assert len(FAULTS) >= 12
