"""Overlap on cards with one hardware queue: steps take hardly longer than with many."""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from tests.fake_cuda.recorder import Recorded
from tests.races.one_queue import makespans_s
from tests.races.queue_cases import CASES, record

pytestmark = pytest.mark.races

# Copies to slots and sums over replicas are on the critical path, and a part of second stages.
MOST = {"one layer": 1.06, "pipeline of two stages": 1.06, "four layers, node by node": 1.15}
"""Makespan with one queue over that with many."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.nightly] * (case != "one layer")) for case in MOST],
)
def test_exchanges_overlap_in_one_queue(case: str, ranks: RankPools, text_data: str) -> None:
    at_once, when_needed = (
        ranks(CASES[case].ranks).run(record, text_data, case, late) for late in (False, True)
    )
    for of_rank in (*at_once, *when_needed):
        kernels = [item for item in of_rank if isinstance(item, Recorded)]
        assert sum(kernel.flops > 0 for kernel in kernels) > 20
        assert {"the stream of parameters", "the stream of gradients"} <= {
            kernel.stream for kernel in kernels if kernel.meets
        }
    cluster = load_cluster("a100-4x8-ib800")
    found = makespans_s(at_once, when_needed, cluster, CASES[case].node_size)
    assert found["after"] < MOST[case] * found["many"] < found["before"], found
