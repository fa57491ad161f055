"""Choices of replicas keep the quotas and send fewer rows, compared with all possible choices.

Legend: T tokens, E experts, S slots, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.config import Split
from megatron_laer.layer.dispatch import replica_choice
from megatron_laer.layer.dispatch.replica_choice import choose_replicas, token_order
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from tests.unit.planner_cases import geometries

LEAST_SHARE = replica_choice._LEAST_SHARE


@dataclass(frozen=True)
class Rank:
    layout: ExpertLayout
    map_TE: torch.Tensor
    quotas: RankQuotas
    node_size: int
    rank: int

    def chosen(self) -> torch.Tensor:
        return choose_replicas(self.map_TE, self.quotas, self.node_size, self.rank)

    def plain(self) -> torch.Tensor:
        return token_order(self.map_TE, self.quotas, self.node_size)

    def rows(self, slot_P: torch.Tensor) -> tuple[int, int]:
        _, tokens = np.nonzero(self.map_TE.numpy().T)
        ranks = slot_P.numpy() // self.layout.capacity
        to_ranks = set(zip(tokens.tolist(), ranks.tolist(), strict=True))
        to_nodes = {(token, rank // self.node_size) for token, rank in to_ranks}
        home = self.rank // self.node_size
        return (
            sum(node != home for _, node in to_nodes),
            sum(rank != self.rank for _, rank in to_ranks),
        )

    def check_legal(self, slot_P: torch.Tensor) -> None:
        """Check that every slot has its quota of pairs, all of its own expert."""
        assert slot_P.dtype == torch.int32
        experts, _ = np.nonzero(self.map_TE.numpy().T)
        np.testing.assert_array_equal(self.layout.slot_expert_S[slot_P.numpy()], experts)
        num_slots = self.layout.num_slots
        np.testing.assert_array_equal(
            np.bincount(slot_P.numpy(), minlength=num_slots), self.quotas.row_S
        )


def make_rank(
    *,
    ranks: int,
    node_size: int,
    experts: int,
    capacity: int,
    top_k: int,
    tokens: int,
    split: Split = Split.EVEN,
    skew: float = 0.0,
    seed: int = 0,
) -> Rank:
    """Route by seed on a random layout; the even split gives most experts a choice."""
    rng = np.random.default_rng(seed)
    log_E = skew * rng.normal(size=experts)
    maps = np.zeros((ranks, tokens, experts), dtype=np.bool_)
    for map_TE in maps:
        chosen_TK = np.argsort(-(log_E + rng.gumbel(size=map_TE.shape)), axis=1)[:, :top_k]
        np.put_along_axis(map_TE, chosen_TK, True, axis=1)
    if tokens > 3:
        maps[:, 2] = False
    rank = int(rng.integers(ranks))
    layout = ExpertLayout.random(ranks, capacity, experts, seed=(seed,))
    quotas = solve_quotas(split, maps.sum(axis=1, dtype=np.int64), layout, node_size)
    mine = RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
    return Rank(layout, torch.from_numpy(maps[rank]), mine, node_size, rank)


@st.composite
def any_rank(draw: st.DrawFn) -> Rank:
    """Draw shapes of all kinds, nodes of one or all ranks, no tokens, more slots than experts."""
    geometry = draw(geometries(8, 12))
    return make_rank(
        ranks=geometry.num_ranks,
        node_size=geometry.node_size,
        experts=geometry.num_experts,
        capacity=geometry.capacity,
        top_k=draw(st.integers(1, min(geometry.num_experts, 4))),
        tokens=draw(st.integers(0, 40)),
        split=draw(st.sampled_from(list(Split))),
        skew=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.fixture(scope="module", autouse=True)
def even_few_pairs_choose() -> Iterator[None]:
    """Lower the threshold: exact quotas leave few pairs a choice."""
    with mock.patch.object(replica_choice, "_LEAST_SHARE", 0.0):
        yield


@given(any_rank())
@settings(deadline=None, max_examples=200)
def test_quotas_are_kept_and_rows_are_never_more_than_in_token_order(rank: Rank) -> None:
    chosen_P = rank.chosen()
    rank.check_legal(chosen_P)
    assert rank.rows(chosen_P) <= rank.rows(rank.plain())  # rows between nodes count first
    assert torch.equal(chosen_P, rank.chosen())


def least_rows(rank: Rank) -> tuple[int, int]:
    """Return the fewest rows over all assignments of pairs to slots that keep the quotas."""
    experts, _ = np.nonzero(rank.map_TE.numpy().T)
    by_expert = rank.layout.slot_expert_S
    slots = [
        [s for s in np.flatnonzero(by_expert == expert).tolist() if rank.quotas.row_S[s]]
        for expert in experts
    ]
    best = (10**9, 10**9)
    for chosen in product(*slots):
        counts_S = np.bincount(chosen, minlength=rank.layout.num_slots)
        if len(chosen) == 0 or (counts_S == rank.quotas.row_S).all():
            best = min(best, rank.rows(torch.tensor(chosen, dtype=torch.int32)))
    return best


def test_choices_save_most_of_what_the_best_of_all_would() -> None:
    cases = [
        make_rank(ranks=5, node_size=1, experts=4, capacity=2, top_k=2, tokens=7, seed=seed)
        for seed in range(100)
    ]
    plain, chosen, least = (
        np.array([rows(rank) for rank in cases])
        for rows in (
            lambda rank: rank.rows(rank.plain()),
            lambda rank: rank.rows(rank.chosen()),
            least_rows,
        )
    )
    assert (chosen[:, 0] >= least[:, 0]).all()
    could_save = (plain[:, 0] - least[:, 0]).sum()
    assert could_save >= 10, "the cases leave no room"
    assert (plain[:, 0] - chosen[:, 0]).sum() >= 0.8 * could_save


@pytest.mark.parametrize(("experts", "top_k", "least_saved"), [(16, 4, 0.10), (64, 8, 0.04)])
def test_many_experts_with_a_choice_save_rows(experts: int, top_k: int, least_saved: float) -> None:
    rank = make_rank(
        ranks=16,
        node_size=4,
        experts=experts,
        capacity=-(-experts // 16) + 2,
        top_k=top_k,
        tokens=512,
    )
    before, after = rank.rows(rank.plain())[0], rank.rows(rank.chosen())[0]
    assert after <= (1 - least_saved) * before


@pytest.mark.parametrize(("capacity", "split"), [(2, Split.EVEN), (3, Split.EXACT)])
def test_nothing_is_computed_where_hardly_any_pair_has_a_choice(
    capacity: int, split: Split
) -> None:
    rank = make_rank(
        ranks=16, node_size=4, experts=32, capacity=capacity, top_k=4, tokens=512, split=split
    )
    with (
        mock.patch.object(replica_choice, "_LEAST_SHARE", LEAST_SHARE),
        mock.patch.object(replica_choice._Wave, "of", side_effect=AssertionError),
    ):
        assert torch.equal(rank.chosen(), rank.plain())
