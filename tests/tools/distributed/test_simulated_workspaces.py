"""`simulate` counts the workspaces that exchanges allocate, for a rank of a large group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.exchange import flat_exchange, node_exchange
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.tools.simulator.iteration.methods import FSEP, MethodSettings, make_method
from megatron_laer.tools.simulator.iteration.rates import Rates

GEOMETRY = Geometry(8, 16, 4, 2)
HIDDEN, FFN = 32, 64
COSTS = CostModel(load_cluster("a100-4x8-ib800"), HIDDEN, FFN, True, 2)


def allocated_bytes(algorithm: ExchangeAlgorithm) -> int:
    """Return the workspaces' size after exchanges of many layouts, without other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, cpu = GEOMETRY.num_ranks, torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=ranks)
    try:
        groups = process_groups.create_groups(dist.group.WORLD, GEOMETRY.node_size, dist.new_group)
        exchange: Any = {
            ExchangeAlgorithm.FLAT: flat_exchange,
            ExchangeAlgorithm.NODE: node_exchange,
        }[algorithm](groups)
        for seed in range(20):
            index = layout_index(GEOMETRY.random_layout((seed,)), cpu)
            for rows, columns in COSTS.matrices:
                slices = torch.zeros(
                    GEOMETRY.num_experts, rows // ranks, columns, dtype=torch.bfloat16
                )
                exchange.reduce(exchange.restore(slices, index, rows), index)
    finally:
        dist.destroy_process_group()
    spaces = exchange.restore_workspace, exchange.reduce_workspace
    return sum(space.num_bytes for space in spaces)


@pytest.mark.parametrize("algorithm", ExchangeAlgorithm)
def test_workspaces_are_those_of_the_exchanges(
    algorithm: ExchangeAlgorithm, ranks: RankPools
) -> None:
    costs = replace(COSTS, restore_algorithm=algorithm)
    method = make_method(FSEP, MethodSettings(GEOMETRY, costs), Rates(costs.cluster, 2))
    (allocated,) = ranks(1).run(allocated_bytes, algorithm)
    assert allocated == method.fixed_bytes["workspaces"]
