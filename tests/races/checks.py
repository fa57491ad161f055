"""Checks of watched runs: no race, enough seen, and no findings but those of the written list."""

from __future__ import annotations

from tests.fake_cuda.allowed import DOWNLOAD, STOCK, Place, is_ours, split
from tests.fake_cuda.clocks import Watched


def check_clean(ranks: list[Watched], least_operations: int) -> None:
    # Replacements of libraries for the CPU compute on the host.
    races = [race for of in ranks for race in of.races if ", in megatron_laer/cpu/" not in race]
    assert races == []
    assert min(watched.operations for watched in ranks) >= least_operations
    assert min(watched.frees for watched in ranks) >= least_operations // 10


def check_findings(ranks: list[Watched], more: frozenset[Place]) -> None:
    ours, stocks = split(finding for watched in ranks for finding in watched.found)
    assert ours == {DOWNLOAD, *(place for place in more if is_ours(place))}
    assert stocks <= STOCK | more
