"""Rank pools and data that tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import RankPool

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(4)`: the session's pool of four ranks; ranks start once and serve many tests."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a Megatron dataset made of the standard library's sources, as bytes."""
    from megatron_laer.data import default_text_sources, prepare_data

    prefix = tmp_path_factory.mktemp("data") / "text"
    prepare_data(default_text_sources()[:150], str(prefix), progress=False)
    return str(prefix)
