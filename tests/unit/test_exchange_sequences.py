"""Exchanges of one group over its life, in random order and by all ways, against plain copies.

Experts and gradients are small whole numbers, so that sums are exact in every dtype.

Legend: N ranks, E experts, C replica slots per rank. R rows of an expert, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Way, ways_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm import exchange as exchanges
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.memory import poison
from megatron_laer.runtime.comm.segments import Chain, Move, Table
from megatron_laer.runtime.comm.stages import Stage
from tests.exchange_cases import CPU, Case
from tests.loopback import groups_of, run
from tests.sequences import Life, find, run_lives

LAYERS = 2
LAYOUTS = 4


@dataclass
class Layer:
    """One layer: its experts, their gradients so far, and the slots of all ranks."""

    case: Case
    whole_ERK: torch.Tensor
    sums_ERK: torch.Tensor
    main_N: list[list[torch.Tensor]]
    slots_N: list[torch.Tensor]
    had: LayoutIndex | None = None


class ExchangeLife(Life):
    """Life of a group, whose layers take turns in its exchanges."""

    @initialize(seed=st.integers(0, 2000))
    def begin(self, seed: int) -> None:
        self.drawn = torch.Generator().manual_seed(seed)
        case = Case.draw(seed)
        self.geometry: Geometry = case.geometry
        self.ways: tuple[Way, ...] = ways_of(self.geometry)
        self.indices: dict[int, LayoutIndex] = {}
        self.way_of: dict[ExpertLayout, Way] = {}
        self.exchanges = [
            Exchange(group, self.ways, lambda placed: self.way_of[placed.layout], case.wire)
            for group in groups_of(self.geometry.num_ranks, self.geometry.node_size)
        ]
        payload = replace(case, matrices=((5, 1), *case.matrices[1:]), dtype=torch.uint8)
        self.layers = [self.layer_of(one) for one in (case, payload)]

    def numbers(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 3, shape, generator=self.drawn).to(dtype)

    def layer_of(self, case: Case) -> Layer:
        ranks = range(self.geometry.num_ranks)
        whole_ERK = self.numbers(self.geometry.num_experts, case.rows, 3, dtype=case.dtype)
        zeros_ERK = torch.zeros(whole_ERK.shape)
        main_N = [case.owned_by(rank, zeros_ERK.to(case.main)) for rank in ranks]
        return Layer(case, whole_ERK, zeros_ERK, main_N, [poison(case.new_slots()) for _ in ranks])

    def index_of(self, number: int, way: int) -> LayoutIndex:
        """Return a layout of few, which comes back with the chains that it had."""
        if number not in self.indices:
            layout = self.geometry.random_layout((number,))
            self.indices[number] = layout_index(Placed(layout, self.geometry), CPU)
            self.way_of[layout] = self.ways[way % len(self.ways)]
        return self.indices[number]

    def experts(self, index: LayoutIndex, rank: int) -> list[tuple[int, int]]:
        """Return the filled slots of a rank, each with its expert."""
        experts_C = index.placed.replica_expert_S.reshape(self.geometry.num_ranks, -1)[rank]
        return [(slot, int(expert)) for slot, expert in enumerate(experts_C) if expert != EMPTY]

    @rule(
        at=st.integers(0, LAYERS - 1),
        number=st.integers(0, LAYOUTS - 1),
        way=st.integers(0, 9),
        anew=st.booleans(),
    )
    def restore(self, at: int, number: int, way: int, anew: bool) -> None:
        """Restore a layout's experts, all of them or those that differ."""
        self.step()
        layer = self.layers[at]
        index, case = self.index_of(number, way), layer.case
        before = None if anew else layer.had
        if before is None:
            for slots_CRK in layer.slots_N:
                poison(slots_CRK)
        run(
            [
                exchange.restore_steps(
                    case.owned_by(rank, layer.whole_ERK),
                    index,
                    case.matrices,
                    before=before,
                    out=layer.slots_N[rank],
                )
                for rank, exchange in enumerate(self.exchanges)
            ]
        )
        layer.had = index
        for rank, slots_CRK in enumerate(layer.slots_N):
            for slot, expert in self.experts(index, rank):
                assert torch.equal(slots_CRK[slot], layer.whole_ERK[expert]), (case, rank, slot)

    @rule(at=st.integers(0, LAYERS - 1))
    @precondition(lambda self: any(layer.had for layer in self.layers))
    def reduce(self, at: int) -> None:
        """Add gradients of the layout in the slots to those that the owners have."""
        layer = self.layers[at]
        if layer.had is None:
            return
        self.step()
        case, index = layer.case, layer.had
        grads_N = [self.numbers(*case.new_slots().shape, dtype=case.grad) for _ in layer.slots_N]
        given_N = [grads_CRK.clone() for grads_CRK in grads_N]
        run(
            [
                exchange.reduce_steps(
                    grads_N[rank], index, case.matrices, add_to=layer.main_N[rank]
                )
                for rank, exchange in enumerate(self.exchanges)
            ]
        )
        for rank, grads_CRK in enumerate(grads_N):
            assert torch.equal(grads_CRK, given_N[rank]), "the gradients were changed"
            for slot, expert in self.experts(index, rank):
                layer.sums_ERK[expert] += grads_CRK[slot].float()
        for rank, found in enumerate(layer.main_N):
            wanted = case.owned_by(rank, layer.sums_ERK)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one.float(), other), (case, rank)

    @rule(at=st.integers(0, LAYERS - 1))
    def update(self, at: int) -> None:
        """Change the owners' experts, as an optimizer does: nothing in slots is valid."""
        self.step()
        layer = self.layers[at]
        layer.whole_ERK = self.numbers(*layer.whole_ERK.shape, dtype=layer.case.dtype)
        layer.sums_ERK.zero_()
        for parts in layer.main_N:
            for part in parts:
                part.zero_()
        layer.had = None


def test_a_groups_exchanges_are_exact_in_any_order_by_day() -> None:
    run_lives(ExchangeLife, 500)


@pytest.mark.nightly
def test_a_groups_exchanges_are_exact_in_any_order() -> None:
    run_lives(ExchangeLife, 20_000)


# Deliberate faults of state: each replaces an attribute of the package.


def outgrown() -> Any:
    """Return other memory of a holding behind the hop that another one goes on filling."""
    restore = exchanges._restore

    def grown(direction: Any, chain: Chain, *given: Any) -> Iterator[bool]:
        for at, following in enumerate(restore(direction, chain, *given)):
            yield following
            if at + 1 < len(chain.moves) and chain.moves[at + 1].is_kept:
                poison(direction.workspace.receive._bytes)

    return mock.patch.object(exchanges, "_restore", grown)


def chains_by(*parts: str) -> Any:
    """Return chains that were made for other arguments than these."""
    chain = Exchange._chain

    def found(
        self: Exchange, index: LayoutIndex, matrices: Any, before: Any = None, **more: Any
    ) -> Chain:
        given = {"self": self, "matrices": matrices, "before": before, **more}
        key = tuple(given.get(part) for part in parts)
        if key not in index.chains:
            index.chains[key] = chain(self, index, matrices, before, **more)
        return index.chains[key]

    return mock.patch.object(Exchange, "_chain", found)


def sums_that(*, add: bool) -> Any:
    table_add = Table.add
    return mock.patch.object(Table, "add", lambda *given, **_: table_add(*given, adds=add))


def overwritten() -> Any:
    """Return an All-to-All whose rows are overwritten before they have left."""
    all_to_all = Stage.all_to_all

    def early(self: Stage, received: torch.Tensor, sent: torch.Tensor, *sizes: Any) -> None:
        all_to_all(self, received, sent, *sizes)
        poison(sent)

    return mock.patch.object(Stage, "all_to_all", early)


def sent_from_holdings() -> Any:
    return mock.patch.object(Move, "packs", property(lambda self: not self.leaves_in_place))


FAULTS: dict[str, Callable[[], Any]] = {
    "memory of a holding is outgrown between two moves into it": outgrown,
    "rows of a holding are sent from memory that is handed on": sent_from_holdings,
    "memory is overwritten before its rows have left": overwritten,
    "a chain ignores the layout before": lambda: chains_by("self", "matrices", "back"),
    "a chain ignores its direction": lambda: chains_by("self", "matrices", "before"),
    "a chain ignores its matrices": lambda: chains_by("self", "before", "back"),
    "the last sums overwrite the owners'": lambda: sums_that(add=False),
    "sums are added to what was in memory": lambda: sums_that(add=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_deliberate_faults_of_state_are_found(fault: str) -> None:
    find(ExchangeLife, FAULTS[fault](), (AssertionError, ValueError, IndexError))
