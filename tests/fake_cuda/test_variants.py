"""Layouts compile no kernel again: tables differ in length and alignment only.

Exchanges are those of one rank of a large group, whose kernels are counted and not run.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.streams import finish
from tests.fake_cuda.device import observed
from tests.fake_cuda.kernels import only_counted
from tests.fake_cuda.labels import card

pytestmark = pytest.mark.races

RANKS, NODE_SIZE, EXPERTS, CAPACITY, RANK = 8, 2, 16, 4, 3
ROWS, COLUMNS = 64, 48
WARM_UP, LAYOUTS = 8, 20


def variants_by_layouts(
    sharding: Sharding, algorithm: ExchangeAlgorithm
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the variants of each kernel after a few random layouts, and after many more."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        groups = process_groups.create_groups(dist.group.WORLD, NODE_SIZE, dist.new_group)
        geometry = Geometry(RANKS, EXPERTS, CAPACITY, NODE_SIZE, sharding)
        exchange = Exchange(groups, [way_of(geometry, algorithm)])
        with observed(only_counted) as device:
            counts = []
            before: LayoutIndex | None = None
            for seed in range(WARM_UP + LAYOUTS):
                index = layout_index(Placed(geometry.random_layout((seed,)), geometry), card())
                _exchange(exchange, index, before)
                before = index
                counts.append({name: len(of) for name, of in device.launches.variants.items()})
    finally:
        dist.destroy_process_group()
    return counts[WARM_UP - 1], counts[-1]


def _exchange(exchange: Exchange, index: LayoutIndex, before: LayoutIndex | None) -> None:
    """Restore all slots, and those that changed, and reduce."""
    number, options = index.placed.geometry.home_slots, {"device": card()}
    shapes = [(ROWS, COLUMNS)] * number or [(EXPERTS * ROWS // RANKS, COLUMNS)]
    owned = [torch.empty(shape, dtype=torch.bfloat16, **options) for shape in shapes]
    sums = [torch.zeros(shape, **options) for shape in shapes]
    slots = index.placed.geometry.replica_slots, ROWS, COLUMNS
    slots_CRK = torch.empty(slots, dtype=torch.bfloat16, **options)
    of_index = owned, index, ((ROWS, 1),)
    finish(exchange.restore_steps(*of_index, out=slots_CRK))
    if before is not None:
        finish(exchange.restore_steps(*of_index, before=before, out=slots_CRK))
    finish(exchange.reduce_steps(torch.zeros_like(slots_CRK), index, ((ROWS, 1),), add_to=sums))


@pytest.mark.parametrize("algorithm", ExchangeAlgorithm)
@pytest.mark.parametrize("sharding", Sharding)
def test_only_the_first_layouts_compile_kernels(
    sharding: Sharding, algorithm: ExchangeAlgorithm, ranks: RankPools
) -> None:
    ((first, last),) = ranks(1).run(variants_by_layouts, sharding, algorithm)
    assert first == last
    assert "_sum_segments" in first
