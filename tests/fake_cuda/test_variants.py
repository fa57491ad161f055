"""Layouts compile no kernel again: index tensors differ in length and alignment only."""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda import variants

pytestmark = pytest.mark.races


@pytest.mark.parametrize("way", ["flat", "node", "relay"])
def test_no_layout_but_the_first_compiles_a_kernel(way: str, ranks: RankPools) -> None:
    ((first, last),) = ranks(1).run(variants.variants_by_layouts, way)
    assert first == last
    assert "_sum_replicas" in first
