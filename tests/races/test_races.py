"""No access to memory is unordered, in any scenario; and every deliberate fault is found.

The code for CUDA runs unchanged, on the labelled device (`tests/fake_cuda`). Its findings are those
of the written list, and nothing else. A graph's capture meets one operation of ours, which counts a
rank's tokens, and no host wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda.allowed import DOWNLOAD, IN_FLOAT64, STOCK, VERIFIED, is_ours, split
from tests.fake_cuda.device import H100
from tests.fake_cuda.fault import AT_NIGHT, read
from tests.fake_cuda.findings import Kind
from tests.fake_cuda.kernels import replaced_by_torch
from tests.launch_order import problems
from tests.races import training

FAULTS = read(Path(__file__).with_name("faults.txt"))


def by_day(names: Iterable[str], at_night: Iterable[str]) -> list[Any]:
    night = [pytest.param(name, marks=pytest.mark.nightly) for name in at_night]
    return [name for name in names if name not in {*at_night}] + night


@pytest.mark.parametrize("scenario", by_day(training.DAILY, training.AT_NIGHT))
def test_megatrons_loop_trains_without_a_race(
    scenario: str, ranks: RankPools, text_data: str
) -> None:
    settings = training.SCENARIOS[scenario]
    if settings.resumes:
        ranks(settings.ranks).run(training.save_on_cpu, text_data, scenario)
    watched = ranks(settings.ranks).run(training.watch, text_data, scenario)
    # Replacements of libraries for the CPU compute on the host.
    races = [race for of in watched for race in of.races if ", in megatron_laer/cpu/" not in race]
    if settings.accumulates:
        races = [race for race in races if "reads what add on the compute stream" not in race]
    assert races == []
    assert min(one.operations for one in watched) >= 2000
    assert min(one.frees for one in watched) >= 200
    ours, stocks = split(finding for one in watched for finding in one.found)
    verified = VERIFIED if "verify=off" not in settings.flags else set()
    assert ours - {IN_FLOAT64} == {DOWNLOAD, *verified, *filter(is_ours, settings.more)}
    assert stocks <= STOCK | settings.more
    assert problems([one.orders for one in watched]) == []
    if settings.captured or settings.kernels is not replaced_by_torch:
        on_cpu = ranks(settings.ranks).run(training.losses_on_cpu, text_data, scenario)
        assert [one.results for one in watched] == on_cpu
    for one in watched:
        assert one.held_up == one.compiled_in_steps == []
        assert bool(one.launches) == (settings.kernels is not replaced_by_torch)
        assert {(name, place) for name, place in one.captured if "megatron_laer" in place} == (
            settings.captured
        )
        assert not [name for name, _ in one.captured if name.startswith("c10d::")]
        assert not [finding for finding in one.found if finding.kind is Kind.UNRECORDED]


def test_a_card_without_the_recipe_is_refused_on_every_rank(
    ranks: RankPools, text_data: str
) -> None:
    scenario = "experts at home in mxfp8, both overlaps"
    for result in ranks(2).run_raw(training.watch, text_data, scenario, None, H100):
        assert result.type_name == "ValueError", result.traceback
        assert "this card has 9.0" in result.message
        assert "give --fp8-recipe tensorwise or blockwise" in result.message


@pytest.mark.parametrize(
    "name",
    by_day(FAULTS, [name for name, fault in FAULTS.items() if AT_NIGHT in fault.words]),
)
def test_a_fault_in_megatrons_loop_is_found(name: str, ranks: RankPools, text_data: str) -> None:
    fault = FAULTS[name]
    if fault.misfit() is not None:
        return  # `test_planted.py` fails
    size = training.SCENARIOS[fault.case].ranks
    found = [
        text
        for watched in ranks(size).run(training.watch, text_data, fault.case, fault)
        for text in watched.report()
    ]
    assert any(fault.found in text for text in found), found
