"""Restore and reduce on real ranks are exact, and send as many bytes as the formulas say.

Over 400 lines: every test runs the same cases through the same ranks, made by the first half.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.layout import ExpertLayout
from tests.placed import placed

COLUMNS = 3


@dataclass(frozen=True)
class Case:
    """Consecutive layouts and one matrix."""

    capacity: int
    experts: int
    rows: int
    dtype: str
    seed: int

    def layout(self, ranks: int, step: int = 0) -> ExpertLayout:
        return ExpertLayout.random(ranks, self.capacity, self.experts, seed=(self.seed, step))


# E that does and does not divide by N, E below N, each expert once, one only.
SHAPES = [(2, 5), (1, 3), (3, 6), (1, 4), (2, 8), (1, 1)]
CASES = [
    Case(capacity, experts, rows, dtype, seed)
    for seed, (capacity, experts) in enumerate(SHAPES)
    for rows in (8, 7, 3)
    for dtype in ("float32", "bfloat16", "float16")
]


@contextmanager
def exchanges_on(node_size: int) -> Iterator[Callable[..., Any]]:
    """Yield `make(algorithm, grad_wire_dtype)` over fresh gloo groups of all ranks."""
    import torch.distributed as dist

    from megatron_laer.runtime.comm import process_groups
    from megatron_laer.runtime.comm.exchange import flat_exchange, node_exchange

    dist.init_process_group("gloo")
    try:
        groups = process_groups.create_groups(dist.group.WORLD, node_size, dist.new_group)

        def make(algorithm: str, grad_wire_dtype: Any = None) -> Any:
            if algorithm == ExchangeAlgorithm.FLAT:
                return flat_exchange(groups)
            return node_exchange(groups, grad_wire_dtype)

        yield make
    finally:
        groups.destroy()
        dist.destroy_process_group()


class Rank:
    """Data of this rank in one case, with results computed without communication."""

    def __init__(self, case: Case, node_size: int) -> None:
        import torch
        import torch.distributed as dist

        self.case, self.node_size = case, node_size
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(case.seed)
        self.whole_ERK = torch.randn((case.experts, case.rows, COLUMNS), generator=generator).to(
            self.dtype
        )
        self.grads_SRK = torch.randn(
            (self.size * case.capacity, case.rows, COLUMNS), generator=generator
        ).to(self.dtype)
        self.start = self.rank * case.rows // self.size
        self.end = (self.rank + 1) * case.rows // self.size

    def index(self, step: int = 0) -> Any:
        import torch

        from megatron_laer.runtime.comm.layout_index import layout_index

        return layout_index(placed(self.case.layout(self.size, step)), torch.device("cpu"))

    @property
    def slice_ErK(self) -> Any:
        return self.whole_ERK[:, self.start : self.end].contiguous()

    @property
    def grad_CRK(self) -> Any:
        first = self.rank * self.case.capacity
        return self.grads_SRK[first : first + self.case.capacity].contiguous()

    def expected_CRK(self, step: int = 0) -> Any:
        return self.whole_ERK[list(self.case.layout(self.size, step).experts_of(self.rank))]

    def expected_ErK(self, algorithm: str, wire: Any) -> Any:
        """Return float32 sums, slot by slot; `node` rounds the sums of a node to its wire dtype.

        The exchange rounds them to the gradient's dtype, or adds them to a main gradient.
        """
        import torch

        slots = self.case.layout(self.size).slot_expert_S.tolist()
        parts = self.grads_SRK[:, self.start : self.end].float()
        is_flat = algorithm == ExchangeAlgorithm.FLAT
        node_slots = len(slots) if is_flat else self.node_size * self.case.capacity
        reduced = []
        for expert in range(self.case.experts):
            total = None
            for first in range(0, len(slots), node_slots):
                node = [s for s in range(first, first + node_slots) if slots[s] == expert]
                if not node:
                    continue
                summed = parts[node[0]].clone()
                for slot in node[1:]:
                    summed += parts[slot]
                if node_slots < len(slots):
                    summed = summed.to(wire).float()
                total = summed if total is None else total + summed
            assert total is not None
            reduced.append(total)
        return torch.stack(reduced)

    def bound_ErK(self, wire: Any, out: Any) -> Any:
        """Bound the difference between the sums of flat and node, as `node_exchange` states it."""
        import torch

        roundoff = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        slots = torch.tensor(self.case.layout(self.size).slot_expert_S.tolist())
        sums = torch.zeros(self.case.experts, self.end - self.start, COLUMNS)
        sums.index_add_(0, slots, self.grads_SRK[:, self.start : self.end].float().abs())
        replicas = torch.bincount(slots)[:, None, None]
        bound = sums * (roundoff[wire] + 2 * roundoff[out] + 2 * replicas * 2.0**-24)
        return bound + (replicas * 2.0**-24 if torch.float16 in (wire, out) else 0.0)


def every_case(node_size: int) -> tuple[int, int]:
    """Restore and reduce all cases with both algorithms; return how many reduces differed.

    The first number is for wires that hold every bit of the gradients, the second for the others.
    """
    import torch

    differed = [0, 0]
    with exchanges_on(node_size) as make:
        wires = (None, torch.float32, torch.bfloat16, torch.float16)
        made = [("flat", None, make("flat"))]
        made += [("node", wire, make("node", wire)) for wire in wires]
        for case in CASES:
            here, results = Rank(case, node_size), []
            for algorithm, wire, exchange in made:
                wire = wire or here.dtype
                index = here.index()
                restored = exchange.restore(here.slice_ErK, index, case.rows)
                assert torch.equal(restored, here.expected_CRK()), (case, algorithm)

                grad = here.grad_CRK
                reduced = exchange.reduce(grad, index)
                assert reduced.dtype == here.dtype
                expected = here.expected_ErK(algorithm, wire)
                assert torch.equal(reduced, expected.to(here.dtype)), (case, algorithm)
                assert torch.equal(reduced, exchange.reduce(grad, index)), "not the same bits again"
                assert torch.equal(grad, here.grad_CRK), "the gradients were changed"
                told = exchange.reduce(grad, index, wire_dtype=torch.bfloat16)
                told_wire = wire if exchange is not made[1][2] else torch.bfloat16
                told_expected = here.expected_ErK(algorithm, told_wire).to(here.dtype)
                assert torch.equal(told, told_expected), (case, algorithm)
                for dtype in (torch.float32, torch.bfloat16):
                    main = torch.full_like(here.slice_ErK, 0.1, dtype=dtype)
                    assert exchange.reduce(grad, index, add_to=main) is main
                    assert torch.equal(
                        main, (0.1 * torch.ones((), dtype=dtype) + expected).to(dtype)
                    )
                total = torch.zeros_like(here.slice_ErK, dtype=torch.float32)
                exchange.reduce(grad, index, add_to=total)
                results.append((wire, reduced, total))
            _, flat, flat_total = results[0]
            for wire, reduced, total in results[1:]:
                distance = (reduced.float() - flat.float()).abs()
                assert (distance <= here.bound_ErK(wire, here.dtype)).all(), (case, wire)
                distance_of_totals = (total - flat_total).abs()
                assert (distance_of_totals <= here.bound_ErK(wire, torch.float32)).all(), case
                differed[wire not in (here.dtype, torch.float32)] += int(distance.any())
    return differed[0], differed[1]


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_both_algorithms_equal_plain_code_bit_for_bit_and_each_other_within_the_bound(
    ranks: RankPools, node_size: int
) -> None:
    exact, rounded = map(sum, zip(*ranks(4).run(every_case, node_size), strict=True))
    # Only nodes of two ranks sum before they send, and one node of all sends nothing. Otherwise the
    # bound would not have been tested.
    assert (exact > 0) == (node_size == 2)
    assert (rounded > 0) == (node_size < 4)


def alone(case: Case) -> int:
    import torch

    with exchanges_on(1) as make:
        here = Rank(case, 1)
        for algorithm in ExchangeAlgorithm:
            exchange = make(algorithm)
            restored = exchange.restore(here.slice_ErK, here.index(), case.rows)
            assert torch.equal(restored, here.expected_CRK())
            reduced = exchange.reduce(here.grad_CRK, here.index())
            assert torch.equal(reduced, here.grad_CRK[here.index().slot_expert_S.argsort()])
            assert exchange.count.restore_collectives == exchange.count.reduce_collectives == 0
        return exchange.count.restore_bytes + exchange.count.reduce_bytes


def test_a_group_of_one_rank_needs_no_collective(ranks: RankPools) -> None:
    assert ranks(1).run(alone, Case(4, 4, 6, "float32", 0)) == [0]


def bytes_of_every_case(node_size: int) -> list[tuple[Case, str, str, int, int]]:
    """Return (case, what, algorithm, intra-node bytes, inter-node bytes) of this rank."""
    import torch

    rows = []
    with exchanges_on(node_size) as make:
        for case in CASES:
            here = Rank(case, node_size)
            for algorithm in ExchangeAlgorithm:
                exchange = make(algorithm, torch.float32)
                count = exchange.count
                restored = exchange.restore(here.slice_ErK, here.index(), case.rows)
                rows.append(
                    (case, "full", algorithm, count.restore_intra_bytes, count.restore_inter_bytes)
                )
                exchange.reduce(here.grad_CRK, here.index())
                rows.append(
                    (case, "reduce", algorithm, count.reduce_intra_bytes, count.reduce_inter_bytes)
                )
                before = count.restore_intra_bytes, count.restore_inter_bytes
                reuse = reusable(here.index(), restored)
                exchange.restore(here.slice_ErK, here.index(1), case.rows, reuse=reuse)
                rows.append(
                    (
                        case,
                        "changed",
                        algorithm,
                        count.restore_intra_bytes - before[0],
                        count.restore_inter_bytes - before[1],
                    )
                )
    return rows


def reusable(index: Any, matrix_CRK: Any) -> Any:
    from megatron_laer.runtime.comm.exchange import ReusableWeights

    return ReusableWeights(index, matrix_CRK)


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_bytes_of_the_collectives_equal_the_formulas(ranks: RankPools, node_size: int) -> None:
    from megatron_laer.planner.traffic import reduce_traffic, restore_traffic

    for rank, counted in enumerate(ranks(4).run(bytes_of_every_case, node_size)):
        for case, what, algorithm, intra_bytes, inter_bytes in counted:
            before, matrices = placed(case.layout(4), node_size), [(case.rows, COLUMNS)]
            intra = inter = 4 if case.dtype == "float32" else 2
            if what == "full":
                traffic = restore_traffic(before, matrices, algorithm)
            elif what == "changed":
                after = placed(case.layout(4, 1), node_size)
                traffic = restore_traffic(after, matrices, algorithm, before=before)
            else:
                traffic = reduce_traffic(before, matrices, algorithm)
                inter = 4 if algorithm == ExchangeAlgorithm.NODE else inter
            assert intra_bytes == intra * traffic.intra_N[rank], (case, what, algorithm)
            assert inter_bytes == inter * traffic.inter_N[rank], (case, what, algorithm)


def layouts_that_follow(node_size: int) -> None:
    import torch

    with exchanges_on(node_size) as make:
        for capacity, experts, rows in [(2, 5, 8), (3, 6, 7), (2, 3, 3)]:
            here = Rank(Case(capacity, experts, rows, "float32", 1), node_size)
            for algorithm in ExchangeAlgorithm:
                exchange = make(algorithm)
                matrix = torch.full_like(here.expected_CRK(), torch.nan)
                exchange.restore(here.slice_ErK, here.index(), rows, out=matrix)
                for step in range(1, 5):
                    reuse = reusable(here.index(step - 1), matrix)
                    result = exchange.restore(here.slice_ErK, here.index(step), rows, reuse=reuse)
                    assert result is matrix
                    assert torch.equal(matrix, here.expected_CRK(step)), (rows, algorithm, step)
                collectives = exchange.count.restore_collectives
                reuse = reusable(here.index(4), matrix)
                # Other weights, so that a fetch would show.
                exchange.restore(here.slice_ErK + 1, here.index(4), rows, reuse=reuse)
                assert torch.equal(matrix, here.expected_CRK(4))
                assert exchange.count.restore_collectives == collectives


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_kept_matrices_fetch_changed_slots_and_nothing_if_nothing_changed(
    ranks: RankPools, node_size: int
) -> None:
    ranks(4).run(layouts_that_follow, node_size)


def buffers_over_layouts(node_size: int) -> list[tuple[str, str, str, int, int, int]]:
    """Return workspace bytes after the first and after many layouts, and by formula."""
    import torch

    from megatron_laer.planner.geometry import Geometry
    from megatron_laer.planner.workspace import reduce_workspace, restore_workspace

    found = []
    with exchanges_on(node_size) as make:
        for dtype in ("float32", "bfloat16"):
            case = Case(2, 5, 8, dtype, 0)
            here = Rank(case, node_size)
            out_CRK, main_ErK = torch.empty_like(here.expected_CRK()), here.slice_ErK
            for algorithm in ExchangeAlgorithm:
                exchange = make(algorithm, torch.float32)
                held = []
                for step in range(12):
                    index = here.index(step)
                    restored = exchange.restore(here.slice_ErK, index, case.rows, out=out_CRK)
                    exchange.reduce(here.grad_CRK, index, add_to=main_ErK)
                    assert restored is out_CRK
                    assert torch.equal(out_CRK, here.expected_CRK(step))
                    held.append(
                        (exchange.restore_workspace.num_bytes, exchange.reduce_workspace.num_bytes)
                    )
                geometry = Geometry(
                    4, 5, 2, 4 if algorithm == ExchangeAlgorithm.FLAT else node_size
                )
                size, wire = (
                    here.dtype.itemsize,
                    4 if algorithm == ExchangeAlgorithm.NODE else here.dtype.itemsize,
                )
                most = (
                    restore_workspace(geometry, case.rows, COLUMNS, size),
                    reduce_workspace(geometry, case.rows, COLUMNS, size, wire),
                )
                for what, first, last, bound in zip(
                    ("restore", "reduce"), held[0], held[-1], most, strict=True
                ):
                    found.append((algorithm, dtype, what, first, last, sum(bound.values())))
    return found


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_buffers_are_allocated_once_and_as_large_as_the_formula(
    ranks: RankPools, node_size: int
) -> None:
    for rows in ranks(4).run(buffers_over_layouts, node_size):
        for algorithm, dtype, what, first, last, bound in rows:
            assert 0 < first == last == bound, (algorithm, dtype, what)


def both_at_once(node_size: int) -> None:
    import torch

    case = Case(3, 6, 8, "float32", 2)
    with exchanges_on(node_size) as make:
        for algorithm in ExchangeAlgorithm:
            here, exchange = Rank(case, node_size), make(algorithm)
            restored: list[Any] = []

            def restore(here: Any = here, exchange: Any = exchange, to: Any = restored) -> None:
                for _ in range(20):
                    to.append(exchange.restore(here.slice_ErK, here.index(), case.rows))

            thread = threading.Thread(target=restore)
            if here.rank % 2:
                thread.start()
            reduced = [exchange.reduce(here.grad_CRK, here.index()) for _ in range(20)]
            if here.rank % 2 == 0:
                thread.start()
            thread.join(600.0)
            assert not thread.is_alive()
            for matrix in restored:
                assert torch.equal(matrix, here.expected_CRK())
            for gradient in reduced:
                expected = here.expected_ErK(algorithm, here.dtype)
                assert torch.equal(gradient, expected.to(here.dtype))
            assert len(restored) == 20


def test_a_restore_and_a_reduce_may_be_in_flight_at_once_in_any_order(ranks: RankPools) -> None:
    for node_size in (1, 2):
        ranks(4).run(both_at_once, node_size)
