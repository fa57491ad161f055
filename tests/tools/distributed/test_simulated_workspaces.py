"""`simulate` counts the workspaces that exchanges allocate, for a rank of a large group."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_laer.choices import Auto, Dispatch, ExchangeAlgorithm, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Way
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.planner.wire_form import WireForm
from megatron_laer.precision import Precision
from megatron_laer.runtime.comm import buffers, process_groups
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.streams import finish
from megatron_laer.tools.simulator.iteration.methods import MethodSettings, fsep
from megatron_laer.tools.simulator.iteration.rates import Rates

GEOMETRY = Geometry(8, 16, 4, 2)
HOMES = replace(GEOMETRY, sharding=Sharding.EXPERTS)
HIDDEN, FFN = 32, 64
COSTS = CostModel(load_cluster("h100-8"), HIDDEN, FFN, True, 2)
LAYOUTS = 20


def allocated_bytes(geometry: Geometry, costs: CostModel, holds: bool) -> int:
    """Return the workspaces' size after exchanges of many layouts, without other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, cpu = geometry.num_ranks, torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=ranks)
    try:
        groups = process_groups.create_groups(dist.group.WORLD, geometry.node_size, dist.new_group)
        ways, chosen = costs.ways(geometry), Counter[Way]()

        def choose(placed: Placed) -> Way:
            way = costs.way_of(placed)
            chosen[way] += 1
            return way

        exchange = Exchange(groups, ways, choose)
        weights, grads = costs.weights_form(geometry.sharding), costs.grads_form
        dtype = torch.uint8 if weights.bytes_per_element == 1 else torch.bfloat16

        def slots(form: WireForm, dtype: torch.dtype) -> torch.Tensor:
            rows = sum(rows * columns for rows, columns in form.matrices)
            return torch.zeros(geometry.replica_slots, rows, 1, dtype=dtype)

        def owned(form: WireForm, dtype: torch.dtype) -> list[torch.Tensor]:
            """Return the elements of each matrix and home expert, or of all experts' slices."""
            number, share = geometry.home_slots or 1, 1 if geometry.home_slots else 16 / ranks
            return [
                torch.zeros(int(rows * columns * share), 1, dtype=dtype)
                for rows, columns in form.matrices
                for _ in range(number)
            ]

        summed = slots(grads, torch.float32 if holds else torch.bfloat16)

        def restore_and_reduce(index: LayoutIndex) -> None:
            given = owned(weights, dtype), index, weights.matrices
            finish(exchange.restore_steps(*given, out=slots(weights, dtype)))
            given = summed, index, grads.matrices
            sums = {"add_to": owned(grads, torch.bfloat16), "wire_dtype": torch.bfloat16}
            finish(exchange.reduce_steps(*given, **sums))

        with mock.patch.object(buffers, "POISONS", False):  # so that they keep their room
            for seed in range(LAYOUTS):
                placed = Placed(geometry.random_layout((seed,)), geometry)
                restore_and_reduce(layout_index(placed, cpu))
    finally:
        dist.destroy_process_group()
    assert len(chosen) == len(ways), "a way was not tried"
    return sum(one.workspace.num_bytes for one in (exchange.restored, exchange.reduced))


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize(
    ("geometry", "way", "precision"),
    [
        (GEOMETRY, ExchangeAlgorithm.FLAT, Precision.PARAMETERS),
        (GEOMETRY, ExchangeAlgorithm.NODE, Precision.PARAMETERS),
        (HOMES, ExchangeAlgorithm.NODE, Precision.PARAMETERS),
        (HOMES, ExchangeAlgorithm.NODE, Precision.BLOCKWISE),
        (HOMES, Auto.AUTO, Precision.PARAMETERS),
    ],
)
def test_workspaces_are_those_of_the_exchanges(
    geometry: Geometry,
    way: ExchangeAlgorithm | Auto,
    precision: Precision,
    holds: bool,
    ranks: RankPools,
) -> None:
    costs = replace(COSTS, precision=precision).with_exchange(way, geometry)
    config = FSEPConfig(restore="step" if holds else "layer")
    settings = MethodSettings(geometry, costs, config)
    method = fsep(settings, Rates(costs.cluster, 2))
    (allocated,) = ranks(1).run(allocated_bytes, geometry, costs, holds)
    most = method.fixed_bytes["workspaces"]
    assert allocated <= most
    # Sums of a step go home directly as they are, and by relay in the dtype between hops.
    assert allocated == most or (holds and costs.by_layout)


NODE = replace(COSTS, restore_algorithm=ExchangeAlgorithm.NODE)


# GiB of NCCL's buffers besides Megatron's own communicator, as in docs/internals/communication.md.
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
            *(replace(COSTS, tokens=TokenPrices(Dispatch.NODE)), 1.375 + 2.75),
        ),
    ],
)
def test_communicators_take_the_memory_that_is_documented(
    ranks: int, sharding: Sharding, costs: CostModel, gib: float
) -> None:
    card = costs.cluster.card
    assert card is not None
    geometry = Geometry(ranks, 64, 64 // ranks + 1, 8, sharding)
    method = fsep(MethodSettings(geometry, costs), Rates(costs.cluster, 2))
    others = card.context_gib * 2**30 + card.communicator_bytes(ranks, 8)
    assert method.fixed_bytes["libraries"] - others == gib * 2**30
