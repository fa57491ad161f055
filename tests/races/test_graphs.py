"""A graph's capture meets one operation of ours, which counts a rank's tokens, and no host wait.

Megatron's loop captures and replays on the labelled device, with calls in place of graphs.
"""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda.findings import Kind
from tests.races import training
from tests.races.checks import check_clean, check_findings
from tests.races.graphs import FAULTS, SCENARIO, WITH_NORMS, look

pytestmark = pytest.mark.races

_COUNT = ("aten::sum", "megatron_laer/layer/dispatch/slot_dispatch.py:SlotDispatching.count")
_COPY = ("aten::clone", "megatron_laer/layer/moe_layer.py:FSEPMoELayer._count")


@pytest.mark.parametrize(
    ("scenario", "ours"), [(SCENARIO, {_COUNT}), (WITH_NORMS, {_COUNT, _COPY})]
)
def test_a_graph_records_the_counts_of_ours_alone(
    scenario: str, ours: set[tuple[str, str]], ranks: RankPools, text_data: str
) -> None:
    settings = training.SCENARIOS[scenario]
    on_cpu = ranks(settings.ranks).run(training.losses_on_cpu, text_data, scenario)
    watched = ranks(settings.ranks).run(training.watch, text_data, scenario, None)
    assert [one.losses for one in watched] == on_cpu
    check_clean(watched, 2000)
    check_findings(watched, settings.more)
    for one in watched:
        captured = {(name, place) for name, place in one.captured if "megatron_laer" in place}
        assert captured == ours
        assert not [name for name, _ in one.captured if name.startswith("c10d::")]
        assert not [finding for finding in one.found if finding.kind is Kind.UNRECORDED]


@pytest.mark.nightly
@pytest.mark.counts(race_faults=1)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_graphs_is_found(name: str, ranks: RankPools, text_data: str) -> None:
    fault = FAULTS[name]
    for found in ranks(2).run(look, text_data, name):
        assert found and any(fault.found in text for text in found), found
