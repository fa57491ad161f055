"""Layouts compile no kernel again: tables differ in length and alignment only."""

from __future__ import annotations

import pytest

from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda import variants

pytestmark = pytest.mark.races


@pytest.mark.parametrize("algorithm", ExchangeAlgorithm)
@pytest.mark.parametrize("sharding", Sharding)
def test_only_the_first_layouts_compile_kernels(
    sharding: Sharding, algorithm: ExchangeAlgorithm, ranks: RankPools
) -> None:
    ((first, last),) = ranks(1).run(variants.variants_by_layouts, sharding, algorithm)
    assert first == last
    assert "_sum_segments" in first
