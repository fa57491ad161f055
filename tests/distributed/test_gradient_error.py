"""The benchmark of gradients' errors trains as FSEP does, and shows the errors it is made for."""

from __future__ import annotations

from benchmarks.gradient_error import measure
from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPools


def test_sums_of_replicas_are_nearer_to_fp64_if_they_are_not_rounded(ranks: RankPools) -> None:
    for algorithm in ExchangeAlgorithm:
        for (found,) in ranks(4).run(measure, algorithm, 4, 2, 1):
            assert found["stock fused"] < found["straight"] < 0.8 * found["rounded first"]


def test_an_expert_without_replicas_is_rounded_once_either_way(ranks: RankPools) -> None:
    for (found,) in ranks(4).run(measure, ExchangeAlgorithm.FLAT, 1, 1, 1):
        assert found["straight"] == found["rounded first"]
