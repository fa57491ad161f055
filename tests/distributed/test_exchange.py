"""Exchanges on real ranks give the results of plain code, alone and two at once.

`tests/unit/test_exchange.py` has many more cases, whose ranks share a process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools

RANKS, CASES = 4, 40


@contextmanager
def gloo_groups(node_size: int) -> Iterator[Any]:
    """Yield fresh process groups of all ranks."""
    import torch.distributed as dist

    from megatron_laer.runtime.comm import process_groups

    dist.init_process_group("gloo")
    try:
        groups = process_groups.create_groups(dist.group.WORLD, node_size, dist.new_group)
        yield groups
        groups.destroy()
    finally:
        dist.destroy_process_group()


def every_case(node_size: int) -> list[str]:
    """Restore, update and reduce; return the ways."""
    import torch

    from megatron_laer.runtime.comm.exchange import Exchange
    from megatron_laer.runtime.comm.steps import finish
    from tests.exchange_cases import Case

    ways = []
    with gloo_groups(node_size) as groups:
        for seed in range(CASES):
            case = Case.draw(seed, (groups.size, node_size))
            exchange = Exchange(groups, [case.way], grad_wire_dtype=case.wire)
            source = case.owned_by(groups.rank, case.whole_ERK)
            restored = finish(exchange.restore_steps(source, case.index(0), case.rows))
            case.check_restored(restored, groups.rank, 0)
            finish(
                exchange.restore_steps(
                    source, case.index(1), case.rows, before=case.index(0), out=restored
                )
            )
            case.check_restored(restored, groups.rank, 1)
            collectives = exchange.restored.collectives
            finish(
                exchange.restore_steps(
                    source, case.index(1), case.rows, before=case.index(1), out=restored
                )
            )
            assert exchange.restored.collectives == collectives, "nothing changed"
            summed = finish(exchange.reduce_steps(case.grads_NCRK[groups.rank], case.index(1)))
            expected = case.summed_ERK(1, case.wire or case.grad).to(case.grad)
            for one, total in zip(summed, case.owned_by(groups.rank, expected), strict=True):
                assert torch.equal(one, total), case
            ways.append(f"{case.geometry.sharding} {case.algorithm}")
    return ways


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_exchanges_of_ranks_equal_plain_code_bit_for_bit(ranks: RankPools, node_size: int) -> None:
    (first, *others) = ranks(RANKS).run(every_case, node_size)
    assert len(set(first)) == 4 and all(ways == first for ways in others)


def both_at_once(node_size: int) -> None:
    import torch

    from megatron_laer.runtime.comm.exchange import Exchange
    from megatron_laer.runtime.comm.steps import finish
    from tests.exchange_cases import Case

    with gloo_groups(node_size) as groups:
        for seed in range(8):
            case = Case.draw(seed, (groups.size, node_size))
            exchange, index = Exchange(groups, [case.way]), case.index(0)
            source, restored = case.owned_by(groups.rank, case.whole_ERK), []

            def restore(case: Any = case, given: Any = (exchange, source, index, restored)) -> None:
                exchange, source, index, to = given
                for _ in range(20):
                    to.append(finish(exchange.restore_steps(source, index, case.rows)))

            thread = threading.Thread(target=restore)
            if groups.rank % 2:
                thread.start()
            grad_CRK = case.grads_NCRK[groups.rank]
            reduced = [finish(exchange.reduce_steps(grad_CRK, case.index(0))) for _ in range(20)]
            if groups.rank % 2 == 0:
                thread.start()
            thread.join(600.0)
            assert len(restored) == 20
            for matrix in restored:
                case.check_restored(matrix, groups.rank, 0)
            expected = case.summed_ERK(0, case.grad).to(case.grad)
            for summed in reduced:
                for one, total in zip(summed, case.owned_by(groups.rank, expected), strict=True):
                    assert torch.equal(one, total)


def test_a_restore_and_a_reduce_may_be_in_flight_at_once_in_any_order(ranks: RankPools) -> None:
    for node_size in (1, 2):
        ranks(RANKS).run(both_at_once, node_size)
