"""`simulate` counts the workspaces that exchanges allocate, for a rank of a large group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_laer.choices import ExchangeAlgorithm, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.precision import Precision
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.steps import SideBySide
from megatron_laer.tools.simulator.iteration.methods import FSEP, MethodSettings, make_method
from megatron_laer.tools.simulator.iteration.rates import Rates

GEOMETRY = Geometry(8, 16, 4, 2)
HOMES = replace(GEOMETRY, sharding=Sharding.EXPERTS)
HIDDEN, FFN = 32, 64
COSTS = CostModel(load_cluster("h100-8"), HIDDEN, FFN, True, 2)
LAYOUTS = 20


def allocated_bytes(
    geometry: Geometry, way: ExchangeAlgorithm, costs: CostModel, one_queue: bool, holds: bool
) -> int:
    """Return the workspaces' size after exchanges of many layouts, without other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, cpu, home = geometry.num_ranks, torch.device("cpu"), geometry.home_slots
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=ranks)
    try:
        groups = process_groups.create_groups(dist.group.WORLD, geometry.node_size, dist.new_group)
        exchange = Exchange(groups, [way_of(geometry, way)])

        def run(exchanges: list[Any]) -> None:
            parts = [exchanges] if one_queue else [[one] for one in exchanges]
            for part in parts:
                together = SideBySide(part, cpu)
                while together.next():
                    pass

        for seed in range(LAYOUTS):
            index = layout_index(Placed(geometry.random_layout((seed,)), geometry), cpu)
            restores, reduces = [], []
            for form, kind in (
                (costs.weights_form(geometry.sharding), restores),
                (costs.grads_form, reduces),
            ):
                for rows, columns in form.matrices:
                    dtype = torch.uint8 if form.bytes_per_element == 1 else torch.bfloat16
                    if kind is reduces:
                        shape = geometry.replica_slots, rows, columns
                        grads = torch.zeros(shape, dtype=torch.float32 if holds else dtype)
                        kind.append(exchange.reduce_steps(grads, index, wire_dtype=dtype))
                    else:
                        shape = (home, rows, columns) if home else (16, rows // ranks, columns)
                        source = torch.zeros(shape, dtype=dtype)
                        kind.append(
                            exchange.restore_steps(source.unbind() if home else source, index, rows)
                        )
            run(restores)
            run(reduces)
    finally:
        dist.destroy_process_group()
    return sum(one.workspace.num_bytes for one in (exchange.restored, exchange.reduced))


@pytest.mark.parametrize(("one_queue", "holds"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("geometry", "way", "precision"),
    [
        (GEOMETRY, ExchangeAlgorithm.FLAT, Precision.PARAMETERS),
        (GEOMETRY, ExchangeAlgorithm.NODE, Precision.PARAMETERS),
        (HOMES, ExchangeAlgorithm.NODE, Precision.PARAMETERS),
        (HOMES, ExchangeAlgorithm.NODE, Precision.BLOCKWISE),
    ],
)
def test_workspaces_are_those_of_the_exchanges(
    geometry: Geometry,
    way: ExchangeAlgorithm,
    precision: Precision,
    one_queue: bool,
    holds: bool,
    ranks: RankPools,
) -> None:
    costs = replace(COSTS, restore_algorithm=way, precision=precision)
    config = FSEPConfig(restore="step" if holds else "layer")
    settings = MethodSettings(geometry, costs, config, one_queue=one_queue)
    method = make_method(FSEP, settings, Rates(costs.cluster, 2))
    (allocated,) = ranks(1).run(allocated_bytes, geometry, way, costs, one_queue, holds)
    assert allocated == method.fixed_bytes["workspaces"]


def test_an_exchange_by_layout_has_the_workspaces_of_the_larger_way() -> None:
    """Both ways use the same buffers, which have the size of the larger one."""
    direct, relay, both = (
        make_method(FSEP, MethodSettings(HOMES, costs), Rates(costs.cluster, 2)).fixed_bytes
        for costs in (
            replace(COSTS, restore_algorithm=ExchangeAlgorithm.FLAT),
            replace(COSTS, restore_algorithm=ExchangeAlgorithm.NODE),
            replace(COSTS, by_layout=True),
        )
    )
    assert both["workspaces"] == max(direct["workspaces"], relay["workspaces"])


NODE = replace(COSTS, restore_algorithm=ExchangeAlgorithm.NODE)


# GiB of NCCL's buffers besides Megatron's own communicator, as in docs/communication.md.
@pytest.mark.parametrize(
    ("ranks", "sharding", "costs", "gib"),
    [
        (8, Sharding.EXPERTS, COSTS, 2.625),
        (32, Sharding.EXPERTS, COSTS, 1.375),
        (32, Sharding.ROWS, NODE, 2.6875),
        (32, Sharding.EXPERTS, NODE, 4.0625),
        (32, Sharding.EXPERTS, replace(COSTS, by_layout=True), 4.0625),
        (
            *(32, Sharding.EXPERTS),
            *(replace(COSTS, tokens=TokenPrices(TokenExchange.NODE)), 1.375 + 2.75),
        ),
    ],
)
def test_communicators_take_the_memory_that_is_documented(
    ranks: int, sharding: Sharding, costs: CostModel, gib: float
) -> None:
    card = costs.cluster.card
    assert card is not None
    geometry = Geometry(ranks, 64, 64 // ranks + 1, 8, sharding)
    method = make_method(FSEP, MethodSettings(geometry, costs), Rates(costs.cluster, 2))
    others = card.context_gib * 2**30 + card.communicator_bytes(ranks, 8)
    assert method.fixed_bytes["libraries"] - others == gib * 2**30
