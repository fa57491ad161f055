"""Replicas come from their homes and gradients go back, directly and by relay, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.traffic import Traffic
from megatron_laer.runtime.comm.stages import ExchangeCount
from tests.placed import placed

COLUMNS = 3
# (C, E) on 4 ranks: one home and several, full and sparse replica slots.
SHAPES = [(2, 4), (3, 8), (5, 8), (4, 12)]


@contextmanager
def exchanges_on(node_size: int, wire: Any = None) -> Iterator[dict[str, Any]]:
    """Yield the exchanges of homes by name, over fresh gloo groups of all ranks."""
    import torch.distributed as dist

    from megatron_laer.runtime.comm import process_groups
    from megatron_laer.runtime.comm.exchange import flat_exchange, node_exchange
    from megatron_laer.runtime.comm.home_exchange import ChosenExchange, DirectExchange
    from megatron_laer.runtime.comm.relay import RelayExchange

    dist.init_process_group("gloo")
    try:
        groups = process_groups.create_groups(dist.group.WORLD, node_size, dist.new_group)
        yield {
            "direct": DirectExchange(groups),
            "relay, flat": RelayExchange(groups, flat_exchange(groups)),
            "relay, node": RelayExchange(groups, node_exchange(groups, wire)),
            # A choice that changes with the layout, unlike prices of such small matrices.
            "chosen": ChosenExchange(
                groups,
                RelayExchange(groups, node_exchange(groups, wire)),
                lambda placed: [*ExchangeAlgorithm][placed.layout.digest % 2],
            ),
        }
    finally:
        groups.destroy()
        dist.destroy_process_group()


class Case:
    """Whole matrices, gradients of all slots, and layouts, the same on every rank."""

    def __init__(self, capacity: int, experts: int, rows: int, dtype: str, seed: int) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.shape = self.ranks, capacity, experts
        self.home, self.seed = experts // self.ranks, seed
        generator = torch.Generator().manual_seed(seed)
        self.dtype = getattr(torch, dtype)
        size = (rows, COLUMNS)
        self.whole_ERK = torch.randn((experts, *size), generator=generator).to(self.dtype)
        slots = self.ranks, capacity - self.home
        self.grads_NCRK = torch.randn((*slots, *size), generator=generator).to(self.dtype)
        self.rows = rows

    @property
    def homes(self) -> list[Any]:
        return list(self.whole_ERK[self.rank * self.home : (self.rank + 1) * self.home])

    def replicas(self, step: int) -> list[int]:
        return list(self.layout(step).experts_of(self.rank)[self.home :])

    def layout(self, step: int) -> ExpertLayout:
        return ExpertLayout.random_at_home(*self.shape, seed=(self.seed, step))

    def index(self, step: int) -> Any:
        import torch

        from megatron_laer.runtime.comm.layout_index import layout_index

        return layout_index(placed(self.layout(step), at_home=True), torch.device("cpu"))

    def expected(self, step: int, wire: Any = None, node_size: int = 0) -> list[Any]:
        """Return the sums of this rank's home experts, in slot order; None without replicas.

        With `wire`, each node's sum is rounded to it, and so is the sum that goes home.
        """
        found = []
        for expert in range(self.rank * self.home, (self.rank + 1) * self.home):
            total = None
            for first in range(0, self.ranks, node_size or self.ranks):
                of_node = None
                for rank in range(first, first + (node_size or self.ranks)):
                    experts = self.layout(step).experts_of(rank)[self.home :]
                    if expert in experts:
                        part = self.grads_NCRK[rank, experts.index(expert)].float()
                        of_node = part if of_node is None else of_node + part
                if of_node is not None:
                    of_node = of_node.to(wire).float() if wire is not None else of_node
                    total = of_node if total is None else total + of_node
            total = total.to(wire).float() if wire is not None and total is not None else total
            found.append(total)
        return found


def every_case(node_size: int) -> int:
    """Restore, change and reduce all cases; return the number of replicas that were compared."""
    import torch

    compared = 0
    with exchanges_on(node_size) as exchanges:
        cases = [
            (*shape, rows, dtype)
            for shape, rows, dtype in product(SHAPES, (8, 7), ("float32", "bfloat16"))
        ]
        for seed, values in enumerate(cases):
            case = Case(*values, seed=seed)
            for name, exchange in exchanges.items():
                index, before = case.index(0), None
                restored = exchange.restore(case.homes, index, case.rows)
                for step in range(4):
                    if before is not None:
                        from megatron_laer.runtime.comm.exchange import ReusableWeights

                        index = case.index(step)
                        reuse = ReusableWeights(before, restored)
                        changed = exchange.restore(case.homes, index, case.rows, reuse=reuse)
                        assert changed is restored
                    for slot, expert in enumerate(case.replicas(step)):
                        if expert != EMPTY:
                            compared += 1
                            assert torch.equal(restored[slot], case.whole_ERK[expert]), (
                                values,
                                name,
                                step,
                            )
                    before = index
                if not index.placed.has_replicas:
                    continue
                check_reduce(case, exchange, index, name, node_size)
    return compared


def check_reduce(case: Case, exchange: Any, index: Any, name: str, node_size: int) -> None:
    import torch

    grad_CRK = case.grads_NCRK[case.rank].clone()
    is_direct = name == "direct" or (name == "chosen" and index.placed.layout.digest % 2 == 0)
    wire = None if is_direct else case.dtype
    by_node = name in ("relay, node", "chosen") and not is_direct
    expected = case.expected(3, wire, node_size if by_node else 0)
    main = [torch.full(matrix.shape, 0.1) for matrix in case.homes]
    exchange.reduce(grad_CRK, index, add_to=main)
    again = [torch.full(matrix.shape, 0.1) for matrix in case.homes]
    exchange.reduce(grad_CRK, index, add_to=again)
    sums_hRK = exchange.reduce(grad_CRK, index)
    assert sums_hRK.dtype == case.dtype
    assert torch.equal(grad_CRK, case.grads_NCRK[case.rank]), "the gradients were changed"
    for home, total in enumerate(expected):
        assert torch.equal(main[home], again[home]), "not the same bits again"
        if total is None:
            assert torch.equal(main[home], torch.full_like(main[home], 0.1))
            assert not sums_hRK[home].any()
        else:
            assert torch.equal(main[home], 0.1 + total), (case.shape, name)
            assert torch.equal(sums_hRK[home], total.to(case.dtype)), (case.shape, name)


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_replicas_equal_their_homes_and_gradients_their_sums(
    ranks: RankPools, node_size: int
) -> None:
    compared = ranks(4).run(every_case, node_size)
    assert sum(compared) > 500


def bytes_of_every_case(node_size: int) -> int:
    """Compare counted bytes of restores, changes and reduces with the formulas; return all."""
    import torch.distributed as dist

    from megatron_laer.planner.traffic import reduce_traffic, restore_traffic
    from megatron_laer.runtime.comm.exchange import ReusableWeights

    moved = 0

    def compare(traffic: Traffic, before: tuple[int, int], after: tuple[int, int]) -> None:
        nonlocal moved
        of_rank = traffic.times(4)
        counted = after[0] - before[0], after[1] - before[1]
        assert counted == (of_rank.intra_N[case.rank], of_rank.inter_N[case.rank])
        moved += sum(counted)

    with exchanges_on(node_size) as exchanges:
        ranks, algorithms = dist.get_world_size(), [*ExchangeAlgorithm]
        for seed, (spare, home, rows) in enumerate(product((1, 2), (1, 2), (8, 11))):
            case = Case(home + spare, home * ranks, rows, "float32", seed=seed)
            matrices = [(rows, COLUMNS)]
            first, then = case.index(0), case.index(1)
            for name, algorithm in zip(("direct", "relay, node"), algorithms, strict=True):
                exchange, count = exchanges[name], exchanges[name].count
                marks = [restored_so_far(count)]
                restored = exchange.restore(case.homes, first, rows)
                marks.append(restored_so_far(count))
                reuse = ReusableWeights(first, restored)
                exchange.restore(case.homes, then, rows, reuse=reuse)
                marks.append(restored_so_far(count))
                of_first, of_then = (
                    placed(index.placed.layout, node_size, at_home=True) for index in (first, then)
                )
                compare(restore_traffic(of_first, matrices, algorithm), *marks[:2])
                changed = restore_traffic(of_then, matrices, algorithm, before=of_first)
                compare(changed, *marks[1:])
                if of_then.has_replicas:
                    begin = count.reduce_intra_bytes, count.reduce_inter_bytes
                    exchange.reduce(case.grads_NCRK[case.rank].clone(), then)
                    end = count.reduce_intra_bytes, count.reduce_inter_bytes
                    compare(reduce_traffic(of_then, matrices, algorithm), begin, end)
    return moved


def restored_so_far(count: ExchangeCount) -> tuple[int, int]:
    return count.restore_intra_bytes, count.restore_inter_bytes


@pytest.mark.parametrize(("size", "node_size"), [(4, 1), (4, 2), (8, 8), (8, 4), (8, 2)])
def test_bytes_of_replicas_are_those_of_the_formulas(
    ranks: RankPools, size: int, node_size: int
) -> None:
    assert sum(ranks(size).run(bytes_of_every_case, node_size)) > 10_000
