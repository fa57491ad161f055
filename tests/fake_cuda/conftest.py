"""Ranks of these tests alone: modules imported while torch's streams are replaced stay in them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_laer.cpu.ranks import RankPools


@pytest.fixture(scope="package")
def ranks() -> Iterator[RankPools]:
    """Return `ranks(4)`: a pool of four ranks, which ends with the tests of this folder."""
    with RankPools(4) as pools:
        yield pools
