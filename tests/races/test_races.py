"""No access to memory is unordered, in any scenario; and every deliberate fault is found.

The code for CUDA runs unchanged, on the labelled device (`tests/fake_cuda`). Its findings are those
of the written list, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda.device import H100
from tests.fake_cuda.kernels import replaced_by_torch
from tests.launch_order import problems
from tests.races import layers, training
from tests.races.checks import check_clean, check_findings
from tests.races.faults import LAYER_FAULTS, TRAINING_FAULTS, Scene

# Parts of other scenarios and tests, and faults that the layers show as well.
AT_NIGHT = {
    *("plain", "random layouts", "recompute of the MoE layer", "both overlaps", *LAYER_FAULTS),
    "tokens through nodes of 1, recompute of the MoE layer",
    *("experts at home, both overlaps", "experts at home, full recompute, both overlaps"),
    *("kernels, experts at home by relay", "kernels, rows in nodes of 2", "Muon"),
    *("one queue, virtual pipeline 2 x 2", "one queue, fresh layouts after the gate"),
    *("one queue, kernels, rows in nodes of 2", "one queue, kernels, by nodes of 1"),
    "graphs of attention, router and counts, both overlaps",
    "experts at home, graphs of router and counts, recompute of norms",
    "combined 1F1B with delayed weight gradients, virtual pipeline 2 x 2",
    "experts' weight gradients during the dispatch's backward",
    *("DeepEP, fresh layouts, shared experts", "HybridEP, grouped GEMMs in bf16"),
    *("shared experts that overlap, permute fusion", "save and load"),
    "Megatron-FSDP of gradients, home experts replicated",
    "nobody waits for home experts that Megatron-FSDP gathers",
    "experts at home in mxfp8, both overlaps",
    "one queue, experts at home in mxfp8 held over a step, recompute of the MoE layer",
}


def daily(names: Iterable[str]) -> list[Any]:
    night = [pytest.mark.nightly]
    return [pytest.param(name, marks=night if name in AT_NIGHT else []) for name in names]


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("scene", Scene)
def test_layers_train_without_a_race(scene: Scene, one_queue: bool, ranks: RankPools) -> None:
    check_clean(ranks(2).run(layers.watch, scene, None, one_queue), 500)


@pytest.mark.counts(race_faults=1)
@pytest.mark.parametrize("fault", LAYER_FAULTS)
def test_a_fault_in_the_layers_is_found(fault: str, ranks: RankPools) -> None:
    _, scene, found, one_queue = LAYER_FAULTS[fault]
    for watched in ranks(2).run(layers.watch, scene, fault, one_queue):
        assert [race for race in watched.races if found in race], watched.races


@pytest.mark.counts(race_scenarios=1)
@pytest.mark.parametrize("scenario", daily(training.SCENARIOS))
def test_megatrons_loop_trains_without_a_race(
    scenario: str, ranks: RankPools, text_data: str
) -> None:
    settings = training.SCENARIOS[scenario]
    if settings.resumes:
        ranks(settings.ranks).run(training.save_on_cpu, text_data, scenario)
    watched = ranks(settings.ranks).run(training.watch, text_data, scenario, None)
    check_clean(watched, 2000)
    check_findings(watched, settings.more)
    assert problems([one.orders for one in watched]) == []
    if settings.kernels is not replaced_by_torch:
        on_cpu = ranks(settings.ranks).run(training.losses_on_cpu, text_data, scenario)
        assert [one.losses for one in watched] == on_cpu
        assert all(sum(one.launches.values()) > 0 for one in watched)
        assert [one.compiled_in_steps for one in watched] == [{}] * len(watched)


def test_a_card_without_the_recipe_is_refused_on_every_rank(
    ranks: RankPools, text_data: str
) -> None:
    scenario = "experts at home in mxfp8, both overlaps"
    for result in ranks(2).run_raw(training.watch_on, H100, text_data, scenario):
        assert result.type_name == "ValueError", result.traceback
        assert "this card has 9.0" in result.message
        assert "give --fp8-recipe tensorwise or blockwise" in result.message


@pytest.mark.counts(race_faults=1)
@pytest.mark.parametrize("fault", daily(TRAINING_FAULTS))
def test_a_fault_in_megatrons_loop_is_found(fault: str, ranks: RankPools, text_data: str) -> None:
    scenario, found = TRAINING_FAULTS[fault].scene, TRAINING_FAULTS[fault].found
    size = training.SCENARIOS[scenario].ranks
    races = [
        race
        for watched in ranks(size).run(training.watch, text_data, scenario, fault)
        for race in watched.races
    ]
    assert [race for race in races if found in race], races


def test_there_are_a_dozen_faults() -> None:
    assert len(LAYER_FAULTS) >= 12
