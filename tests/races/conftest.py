"""Ranks of these tests alone: what is imported while torch's streams are replaced stays in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megatron_laer.cpu.ranks import RankPool, RankPools


@pytest.fixture(scope="package")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(4)`: a pool of four ranks, which ends with the tests of this folder."""
    with RankPools(4) as pools:
        yield pools
